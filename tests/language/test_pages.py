"""A page in Chinese: its texts are said, what people wrote is not touched, and it stays the page that it was."""

import html
import json

import pytest

from cliptune.language.catalogue import language_of
from cliptune.language.pages import say_page
from tests.helpers.texts import Texts

ZH = language_of("zh")


def test_english_is_the_page_itself() -> None:
    page = '<html lang="en"><p>Numbers &amp; more</p>'
    assert say_page(page, language_of("en")) is page


def test_texts_and_attributes_are_said_and_the_language_is_named() -> None:
    page = '<html lang="en"><h2 title="Numbers" class="Numbers">\n Numbers </h2><img alt="Curves"/><br>Curves</html>'
    said = '<html lang="zh-CN"><h2 title="指标" class="Numbers">\n 指标 </h2><img alt="曲线"/><br>曲线</html>'
    assert say_page(page, ZH) == said


@pytest.mark.parametrize(
    "held",
    [
        '<p translate="no" title="Curves">Numbers<br><b>Curves</b> &lt;script&gt; &amp;amp; Curves</p>',
        '<img translate="no" alt="Curves"/>',
        "<script>if (a < b && c) x = 'Curves';</script>",
        "<style>p::before { content: 'Curves' } a > b {}</style>",
        "<!doctype html>",
        "<!-- Curves -->",
    ],
)
def test_what_is_somebodys_or_code_stays_and_what_follows_is_said(held: str) -> None:
    assert say_page(f"{held}<p>Curves</p>", ZH) == f"{held}<p>曲线</p>"


def test_words_of_people_cannot_become_tags() -> None:
    page = f'<p>{html.escape("<b>x</b> & caption 3 of <img src=x>")}</p><i title="{html.escape("Curves")}">&#39;</i>'
    said = say_page(page, ZH)
    assert "<b>" not in said
    assert "<img" not in said
    assert said.endswith('<i title="曲线">\'</i>')


def test_what_a_chart_reads_out_is_said() -> None:
    stops = html.escape(json.dumps([[1.5, 'epoch 2: training 1.5 · my "set" 3', [1, 2]]])).replace("&quot;", "&#34;")
    said = say_page(f'<figure data-stops="{stops}"></figure>', ZH)
    assert Texts(said).found == ['第 2 轮：训练 1.5 · my "set" 3']
    assert html.unescape(said).count("[1, 2]") == 1
