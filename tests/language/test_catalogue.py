import json
import re
import time
from importlib.resources import files
from itertools import combinations

import pytest

from cliptune.language.catalogue import Language, language_of, make_template

ZH = language_of("zh")


def with_catalogue(entries: dict[str, str]) -> Language:
    """A language that knows these texts alone."""
    language = Language("zh")
    templates = [make_template(key, said) for key, said in entries.items()]
    exact = {each.literals[0]: str(each.said[0]) for each in templates if len(each.literals) == 1}
    others = sorted((each for each in templates if len(each.literals) > 1), key=lambda each: -each.num_letters)
    language.__dict__["_catalogue"] = exact, [(max(each.literals, key=len), each) for each in others]
    return language


def test_english_is_what_it_was() -> None:
    text = "1 image\n  and   {odd} %s text; with 中文"
    assert language_of("en").say(text) == language_of("en").say_lines(text) == text


def test_an_unknown_language_is_an_error() -> None:
    with pytest.raises(ValueError, match="'fr'; known: en, zh"):
        Language("fr")


def test_a_whole_text_comes_before_templates_and_the_most_particular_template_first() -> None:
    said = with_catalogue(
        {"{0} is wrong": "{0}有误", "it is wrong": "它有误", "{0} is wrong with {1}": "{1}的{0}有误"}
    ).say
    assert said("it is wrong") == "它有误"
    assert said("this is wrong") == "this 有误"
    assert said("what is wrong with a.png") == "a.png 的 what 有误"


def test_values_may_be_in_another_order_or_twice() -> None:
    said = with_catalogue({"{0} of {1} files are damaged": "{1} 个文件中有 {0} 个损坏（{0}/{1}）"}).say
    assert said("3 of 10 files are damaged") == "10 个文件中有 3 个损坏（3/10）"


def test_names_paths_and_numbers_stay_whatever_they_are() -> None:
    said = with_catalogue({"no such file: {0}": "没有这个文件：{0}", "train": "训练", "{0:n} images": "{0} 张图像"}).say
    for path in ("train", "my images", "/a b/{0}; c.png", "图 (1).png", "$x.*?", "no", "a: b: c"):
        assert said(f"no such file: {path}") == f"没有这个文件：{path}"
    assert said("no such file: 3 images") == "没有这个文件：3 张图像"


def test_a_value_that_is_a_word_of_ours_is_said_where_the_translation_says_so() -> None:
    entries = {
        "the {0} features": "{0:w}特征",
        "image": "图像",
        "the caption is {0}": "描述是 {0:r}",
        "{0:n} texts": "{0} 条文本",
    }
    said = with_catalogue(entries).say
    assert said("the image features") == "图像特征"
    assert said("the other features") == "other 特征"
    assert said("the caption is 3 texts") == "描述是 3 texts"


def test_our_chinese_keeps_a_space_from_latin_letters_and_none_after_a_wide_mark() -> None:
    said = with_catalogue({
        "expected {0} or {1}, got {2}": "应为{0}或{1}，得到的是{2:r}", "a valid integer": "整数",
        "unknown name {0};{1} known: {2}": "未知的名称{0:r}；{1} 已知：{2}", "did you mean {0}?": "你想写的是{0:r}吗？",
    }).say  # fmt: skip
    assert said("expected 'auto', 'true' or 'false', got x") == "应为 'auto'、'true' 或 'false'，得到的是 x"
    assert said("expected a valid integer or 'auto', got  x") == "应为整数或 'auto'，得到的是 x"
    assert said("unknown name a; did you mean b? known: b, c") == "未知的名称 a；你想写的是 b 吗？已知：b, c"
    assert said("unknown name 图 a; known: c") == "未知的名称图 a；已知：c"  # a person's text stays


def test_what_an_evaluation_leaves_out_is_said_with_its_reason() -> None:
    reasons = {
        "1 record and 2 images that cannot be used": "无法使用的 1 条记录和 2 张图像",
        "22 images that were trained on": "训练用过的 22 张图像",
        "3 pairs that --exclude leaves out": "--exclude 排除的 3 对图文",
    }
    for size in range(1, 4):
        for some in combinations(reasons, size):
            for title, said in (("", ""), ("my set (all): ", "my set（全部）：")):
                shown = ZH.say(f"{title}22 images, 44 texts (without {', and '.join(some)})")
                assert shown.startswith(f"{said}22 张图像，44 条文本（不含"), shown
                assert all(reasons[each] in shown for each in some), shown
                assert "图像，和" not in shown


def test_messages_inside_messages_and_lists_come_out_whole() -> None:
    said = with_catalogue({
        "{0} cannot be read: {1}": "{0} 无法读取：{1}", "no such file": "没有这个文件", "{0:n} image": "{0} 张图像",
        "{0:n} images": "{0} 张图像", "and {0:n} more": "另有 {0} 项", "it is empty": "它是空的",
    }).say  # fmt: skip
    assert said("a.csv cannot be read: no such file") == "a.csv 无法读取：没有这个文件"
    assert said("b.png; no such file; and 4 more") == "b.png；没有这个文件；另有 4 项"
    assert said("no such file\n  a.csv cannot be read: it is empty.") == "没有这个文件\n  a.csv 无法读取：它是空的。"
    assert said("1 image, 1,000 images") == "1 张图像，1,000 张图像"
    assert said("1 image, a.png") == "1 image, a.png"  # a name may have a comma


def test_parts_of_a_list_come_before_a_template_that_knows_its_end_alone() -> None:
    said = with_catalogue(
        {"{0} of the images are missing": "缺 {0} 张图像", "{0} is empty ({1})": "{0} 是空的（{1}）"}
    ).say
    assert said("a.csv is empty (b); 3 of the images are missing") == "a.csv 是空的（b）；缺 3 张图像"
    assert said("a; 3 of the images are missing") == "缺 a; 3 张图像"  # a name, maybe


def test_a_text_that_quotes_itself_is_no_trap() -> None:
    said = with_catalogue({"{0}: not {1}, but {2}": "{0}：{2}", "{0} a {1} a {2} b": "x", "say {0} of it": "{0}"}).say
    start = time.perf_counter()
    for text in (
        "a " * 5000,
        ": not , but " * 2000,
        "say " * 3000 + " of it" * 3000,
        "; ".join(["a, b and c. d"] * 300),
    ):
        said(text)
    assert time.perf_counter() - start < 5


def test_columns_of_a_table_stay_where_they_are() -> None:
    language = with_catalogue({"as loaded": "载入时", "chance": "随机水平", "gain (95% interval)": "提升（95% 区间）"})
    lines = language.say_lines(
        "                 as loaded   chance\nrsum                  24.0     31.7   (chance)"
    ).split("\n")
    assert lines[0] == " " * 20 + "载入时 随机水平"
    assert lines[1] == "rsum                  24.0     31.7   (chance)"


@pytest.mark.parametrize(("key", "said"), [("{1} a", "{1}"), ("{0} a", "{1}"), ("{0:x} a", "{0}"), ("{0} a", "{0:n}")])
def test_values_that_do_not_agree_are_an_error(key: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"expected|is no value"):
        make_template(key, said)


def catalogues() -> dict[str, dict[str, str]]:
    folder = files("cliptune.language").joinpath("zh")
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir()}


def test_every_entry_can_be_used() -> None:
    known: dict[str, str] = {}
    for entries in catalogues().values():
        for key, said in entries.items():
            template = make_template(key, said)
            assert re.search("[A-Za-z]", "".join(template.literals)), f"{key!r} would match any text"
            assert key == key.strip(), key
            assert known.setdefault(key, said) == said, f"{key!r} is said in two ways"
            used = {each.place for each in template.said if not isinstance(each, str)}
            # what is left away in Chinese is the plural's ending at most
            assert used == set(range(len(template.is_number))), key


def test_counts_are_said_with_their_measure_words() -> None:
    assert ZH.say("1 image, 2,000 captions") == "1 张图像，2,000 条描述"
