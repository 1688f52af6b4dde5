import pytest
import torch
from torch.nn.functional import normalize

from cliptune.features.similarity import similarity_histograms, similarity_means


def test_similarities_against_the_whole_matrix() -> None:
    images, texts = normalize(torch.randn(30, 8), dim=-1), normalize(torch.randn(50, 8), dim=-1)
    owners = torch.randint(0, 30, (50,))
    scores, matched = images @ texts.T, torch.zeros(30, 50, dtype=torch.bool)
    matched[owners, torch.arange(50)] = True
    means = similarity_means(images, texts, owners)
    assert means["positive_similarity"] == pytest.approx(scores[matched].mean().item(), abs=1e-6)
    assert means["negative_similarity"] == pytest.approx(scores[~matched].mean().item(), abs=1e-6)
    histograms = similarity_histograms(images, texts, owners)
    assert sum(histograms["positive"]) == 50
    assert sum(histograms["negative"]) == 30 * 50 - 50
    assert len(histograms["bin_edges"]) == len(histograms["positive"]) + 1
    for key, mask in (("positive", matched), ("negative", ~matched)):
        expected = torch.histogram(scores[mask], torch.tensor(histograms["bin_edges"])).hist
        assert (torch.tensor(histograms[key]) - expected).abs().sum() <= 2, key  # one on a border may fall either way


def test_the_histogram_of_a_large_gallery_is_of_a_part_of_it() -> None:
    images, texts = normalize(torch.randn(30, 8), dim=-1), normalize(torch.randn(50, 8), dim=-1)
    owners = torch.arange(50) % 30
    histograms = similarity_histograms(images, texts, owners, max_images=10, max_pairs=250)
    rows, columns = torch.arange(0, 30, 3), torch.arange(0, 50, 2)
    unmatched = (owners[columns] != rows[:, None]).sum()
    assert (sum(histograms["positive"]), sum(histograms["negative"])) == (50, unmatched)
