"""The texts of our errors as the sources have them: what the catalogues of other languages must hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cliptune.data.index import KNOWN_FORMS

ROOT = Path(__file__).parents[2]

SHOWN_ELSEWHERE = (
    "cliptune/report/", "cliptune/search/found.py", "cliptune/search/gallery.py", "cliptune/search/server.py",
    "cliptune/training/advice.py", "cliptune/training/journal.py", "cliptune/training/review.py",
    "cliptune/recorded.py", "cliptune/folds_verdict.py", "cliptune/features/tables.py", "cliptune/features/verdict.py",
    "cliptune/features/drift.py", "cliptune/search/lookup.py",
    "cliptune/runs/check.py", "cliptune/runs/classes.py", "cliptune/runs/folds.py", "cliptune/runs/interpolation.py",
    "cliptune/runs/report.py", "cliptune/runs/suspects.py", "cliptune/runs/verdict.py", "cliptune/runs/watch.py",
    # captions of drawn scenes, the model card, and what goes to the log: why a loss or a recipe was chosen, ...
    "cliptune/data/sample_data.py", "cliptune/data/split_lists.py", "cliptune/export/card.py",
    "cliptune/runs/export.py", "cliptune/recipes.py", "cliptune/runs/compiling.py", "cliptune/runs/loss.py",
    "cliptune/runs/other_data.py", "cliptune/model/positions.py", "cliptune/training/profile.py",
    "cliptune/training/optim.py", "cliptune/runtime/environment.py",
)  # fmt: skip
"""Whose texts are those of summary, figures, report, pages and log. Of these files what is raised counts, and the texts
of functions that raise or that make what is raised."""

NO_MESSAGES = ("cliptune/language/", "cliptune/commands.py")
"""What is wrong with a catalogue is told to whoever writes it."""

NOT_SHOWN = {
    "clip_model.py": ("CLIPModel {0}", "a photo of", "projection_dim %d is smaller"),
    "cliptune/cli.py": (
        "speed and memory", "./config.json if there", "JSON file with settings", "none (default):", "%(prog)s",
        "Input should be", "{0} {1} (it is {2})",
    ),
    "cliptune/data/caption_files.py": ("a photo of", "--data_dir {0} takes those", "captions of {0}, not of {1}"),
    "cliptune/data/folder_hints.py": ("--val_data {0}",),
    "cliptune/data/identity.py": ("it holds something else",),
    "cliptune/data/tar_samples.py": ("gunzip <", "bunzip2 <", "unxz <", "unzstd <"),
    "cliptune/data/splits.py": (": what is drawn", "what is drawn"),
    "cliptune/data/workers.py": (
        "%s for %d workers", "no shared memory (%s)", "%s, so what workers load", "open files", "DataLoader worker",
        "Pin memory thread",
    ),
    "cliptune/export/transformers.py": ("image_pooling {0}", "text_pooling {0}"),
    "cliptune/export/verify.py": ("A  big RED", "naïve", "very long", "import runpy"),
    "cliptune/features/classify.py": ("encode classes",),
    "cliptune/features/encode.py": (
        "encode images", "encode texts", "images to be encoded are not cached", "out of memory with {0}",
    ),
    "cliptune/model/attention.py": ("it gives other numbers", "it needs PyTorch"),
    "cliptune/model/self_test.py": ("a photo of a dog", "Two small red boats"),
    "cliptune/model/weights.py": ("%s holds a %s", "the scale itself", "the temperature"),
    "cliptune/preprocess/image_formats.py": (".ai .arw",),
    "cliptune/recipes.py": ("as asked for",),
    "cliptune/report/recorded_queries.py": ("its parts do not fit",),
    "cliptune/runs/data.py": ("row names", "rows name"),
    "cliptune/runs/folds.py": ("the folds' images are", "(of the best", "no epoch is better"),
    "cliptune/runs/journal.py": ("in {0} shards",),
    "cliptune/runs/other_data.py": ("the epoch under way", "the next epoch is", "the best model so far"),
    "cliptune/runs/watch.py": (", without {0}",),
    "cliptune/runs/evaluation.py": ("{0}: {1} of the {2} were trained on",),
    "cliptune/runtime/device.py": (
        "can't allocate memory", "CUDA out of", "CUDA error:", "CUDA driver error:", "Triton Error", "MPS backend",
    ),
    "cliptune/runtime/logs.py": ("%(asctime)s",),
    "cliptune/runtime/memory.py": (
        "can't allocate memory", "annot allocate memory", "unable to mmap", "failed to map segment",
        "find/load shared", "can't start new", "import sys;",
    ),
    "cliptune/training/meters.py": ("skipped (%d in a row)",),
    "cliptune/training/state.py": ("the run has had its", "no better RSum for"),
    "export.py": ("Quantised graphs", "Logits are scale"),
    "cliptune/training/tracking.py": ("tags.",),
    "search.py": ("the first text takes longer",),
    "train.py": ("it has the length",),
}  # fmt: skip
"""How texts begin that end in no error: lines of the log, help, code, prompts, signs that are looked for in errors of
libraries, notes of an export."""

_FORMS = re.sub(r"[{}]", r"\g<0>\g<0>", KNOWN_FORMS)
FILLED_IN = {
    _FORMS: (_FORMS, f"of no known form: {{0}}; {_FORMS}"),
    # said once where several records have it
    "unknown split {0}; known: train, val, test": ("unknown split {0}; known: train, val, test", "unknown split {0}"),
    "of nearly one colour": ("image of nearly one colour ({0})", "images of nearly one colour ({0})"),
    "with a side of less than {0} pixels": (
        "image with a side of less than {0} pixels ({1})", "images with a side of less than {0} pixels ({1})",
    ),
    "more than {0} times as long as wide: models see the centre, less than a third": (
        "image more than {0} times as long as wide: models see the centre, less than a third ({1})",
        "images more than {0} times as long as wide: models see the centre, less than a third ({1})",
    ),
    "smaller than the model's {0} pixels, and enlarged for it": (
        "image smaller than the model's {0} pixels, and enlarged for it ({1})",
        "images smaller than the model's {0} pixels, and enlarged for it ({1})",
    ),
    'expected an object, found {0}{1}': (
        "expected an object, found {0}",
        'a list (pandas names the columns with to_json(orient="records"))',
    ),
    '(pandas names the columns with to_json(orient="records"))': (),
    "another run is writing to {0}{1}: wait until it ends, or choose another --output_dir": (
        "another run is writing to {0}: wait until it ends, or choose another --output_dir",
        "another run is writing to {0} (process {1}): wait until it ends, or choose another --output_dir",
        "another run is writing to {0} on {1} (it was there {2} ago): wait until it ends, or choose another "
        "--output_dir",
    ),
    "on {0} (it was there {1} ago)": (),
    "If it was killed, the folder is free in {0}. {1}": ("If it was killed, the folder is free in {0}",),
    'write it with pandas.{{}}(...).to_parquet("data.parquet")': (
        'write it with pandas.{0}(...).to_parquet("data.parquet")',
    ),
    "{0}cannot be read as an image: {1}": (
        "cannot be read as an image: {0}", "{0}: cannot be read as an image: {1}",
    ),
    "the same file as {0}": ("identical: the same file as {0}",),
    "the one of its copies that is kept": (
        "identical: the one of its copies that is kept", "near-duplicate: the one of its copies that is kept",
    ),
    "{0} {1}, but {2} at {3}": ("split {0}, but {1} at {2}", "group {0}, but {1} at {2}"),
    "on another side of the split": tuple(
        f"{{0}} {noun} on another side of the split" for noun in ("image", "images", "shard", "shards")
    ),
    "{0}: none of its {1} is found": ("{0}: none of its {1} is found", "{0}: none of its {1} is found ({2}): {3}"),
    "{0} of the {1} {2}": (
        "{0} of the {1} is byte-identical to {2} images ({3})", "{0} of the {1} are byte-identical to {2} images ({3})",
    ),
    "a number over {{gt:g}}": ("a number over {0}",),
    "a number of {{ge:g}} or more": ("a number of {0} or more",),
    "a number of {{le:g}} or less": ("a number of {0} or less",),
    "known: {0}, ...; name it with --{1}_key": (
        "{0}: no {1} column: found {2}; known: {3}, ...; name it with --{4}_key",
    ),
    "is no header: add one as the first line, {0}{1}": (
        "of no known form: {0} is no header: add one as the first line, {1}",
    ),
    **{
        text: (f"of no known form: {{0}} {text}",) for text in (
            "is a comment: remove the lines before the header",
            "looks like XML or HTML: write names and captions as CSV with a header image,caption",
            "has blanks between its columns: write a tab there, below a header image<TAB>caption",
            "is numbers alone, as YOLO's boxes are: write captions as CSV with a header image,caption",
            "names no known column: if it is a header, say which with --image_key and --caption_key",
        )
    },
    **{
        text: (f"of no known form: {{0}} is {text}",) for text in (
            "an address without a caption: download the images first, for example with img2dataset",
            "a name without a caption: write each line as name.jpg#0<TAB>caption, or as CSV with a header "
            "image,caption",
        )
    },
}  # fmt: skip
"""Texts that are said only within the longer one that they end or begin: what is a sentence in Chinese."""

TALKS_ELSEWHERE = re.compile(
    r"(logger|logging|warnings|re|self\._logger)\.\w+|Field|print|getattr|hasattr|TypeVar|add_argument|field"
    r"|progress_bar|cast|count"
)
"""Functions whose texts go to the log, help or code; the nouns of `count` have a catalogue and a test of their own."""


class Message(NamedTuple):
    """A text of the sources."""

    template: str
    """With `{0}`, `{1}`, ... for the values of an f-string."""
    values: tuple[str, ...]
    """Their expressions."""
    place: str
    """`file:line`."""


@cache
def messages() -> tuple[Message, ...]:
    """Return all texts of two words or more that can be an error or a part of one."""
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("cliptune/**/*.py")])
    return tuple(each for path in paths for each in _of_file(path))


def keys_of(message: Message) -> tuple[str, ...]:
    """Return what a catalogue must hold for a text: nothing for one that is shown to nobody."""
    if message.template.startswith(NOT_SHOWN.get(message.place.partition(":")[0], ("\0",))):
        return ()
    return FILLED_IN.get(message.template, (message.template,))


def _of_file(path: Path) -> Iterator[Message]:
    name = path.relative_to(ROOT).as_posix()
    if name.startswith(NO_MESSAGES):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents: dict[ast.AST, ast.AST] = {}
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        children = list(ast.iter_child_nodes(node))
        parents |= dict.fromkeys(children, node)
        nodes += children
    taken = _raising(parents) if name.startswith(SHOWN_ELSEWHERE) else {tree}
    for node in nodes:
        pieces = list(_pieces(node))
        if not any(isinstance(each, str) and each.strip() for each in pieces):
            continue
        values = [each for each in pieces if not isinstance(each, str)]
        numbers = iter(range(len(values)))
        template = "".join(
            re.sub(r"[{}]", r"\g<0>\g<0>", each) if isinstance(each, str) else f"{{{next(numbers)}}}" for each in pieces
        )
        template = re.sub("^[;:] ", "", template.strip())  # at which a text is taken apart
        if not _is_phrase(template):
            continue
        above = list(_above(node, parents))
        if not taken.isdisjoint({node, *above}) and not _is_elsewhere(node, above):
            yield Message(template, tuple(map(_source, values)), f"{name}:{getattr(node, 'lineno', 0)}")


def _raising(parents: Mapping[ast.AST, ast.AST]) -> set[ast.AST]:
    """Return what is raised, and functions that raise or are called for it."""
    raised = [node for node in parents if isinstance(node, ast.Raise)]
    calls = (node.func for each in raised for node in ast.walk(each) if isinstance(node, ast.Call))
    called = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    around = {node for each in raised for node in _above(each, parents)}
    functions = [node for node in parents if isinstance(node, ast.FunctionDef)]
    return {*raised, *(each for each in functions if each.name in called or each in around)}


def _above(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in parents:
        node = parents[node]
        yield node


def _is_elsewhere(node: ast.AST, above: list[ast.AST]) -> bool:
    """Tell a docstring, an annotation, a part of a longer text, or what goes to the log, help or code."""
    if above and isinstance(above[0], ast.Expr):
        return True
    return any(_is_no_text(below, each) for below, each in zip([node, *above], above, strict=False))


def _is_no_text(below: ast.AST, node: ast.AST) -> bool:
    """Tell whether what stands directly below a node is a part of its text, or none that a person sees."""
    match node:
        case ast.JoinedStr() | ast.BinOp():
            return any(isinstance(each, str) for each in _pieces(node)) and bool(list(_pieces(below)))
        case ast.Call():
            return below is not node.func and TALKS_ELSEWHERE.fullmatch(ast.unparse(node.func)) is not None
        case ast.keyword():
            return node.arg in {"name", "thread_name_prefix"}  # of a thread
        case ast.FormattedValue():
            return below is node.format_spec
        case ast.Subscript():
            return below is node.slice
        case _:
            return below in (getattr(node, "annotation", None), getattr(node, "returns", None))


def _pieces(node: ast.AST) -> Iterator[str | ast.AST]:
    """Yield the pieces of a text: what it says itself, and the expressions of its values. Nothing: it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            yield from (str(each.value) if isinstance(each, ast.Constant) else each for each in node.values)
        case ast.BinOp(op=ast.Add()):
            left, right = list(_pieces(node.left)), list(_pieces(node.right))
            if left or right:  # a sum of texts, not of numbers
                yield from left or [node.left]
                yield from right or [node.right]


def _source(value: ast.AST) -> str:
    if isinstance(value, ast.FormattedValue):
        return ast.unparse(value.value) + (f"!{chr(value.conversion)}" if value.conversion > 0 else "")
    return ast.unparse(value)


def _is_phrase(template: str) -> bool:
    """Tell a text of two words or more."""
    plain = re.sub(r"\{\d+\}", "", template)
    return " " in template and len(re.findall(r"[A-Za-z']+", plain)) > 1 and plain.upper() != plain
