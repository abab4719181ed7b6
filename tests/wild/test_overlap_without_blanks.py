"""Questions in languages without blanks: one within another text is seen, the same with other numbers is another."""

import re

import pytest

from mot_lora.data.overlap import Overlap

ASKED = {
    "Chinese": "小明有12个苹果，他又买了7个，然后吃掉了3个。请问他现在还有多少个苹果？",  # noqa: RUF001
    "Japanese": "太郎さんはりんごを12個持っています。花子さんから7個もらい、3個食べました。りんごは何個残っていますか?",
    "Thai": "แดงมีแอปเปิ้ล 12 ผล ซื้อเพิ่มอีก 7 ผล แล้วกินไป 3 ผล ตอนนี้แดงมีแอปเปิ้ลทั้งหมดกี่ผล",
    "Lao": "ແດງມີໝາກໂປມ 12 ໜ່ວຍ ຊື້ເພີ່ມອີກ 7 ໜ່ວຍ ແລ້ວກິນໄປ 3 ໜ່ວຍ ຕອນນີ້ມີທັງໝົດຈັກໜ່ວຍ",
    "Korean": "철수는 사과 12개가 있고 7개를 더 샀고 3개를 먹었고 배 4개가 있습니다. 이제 사과가 몇 개 있습니까?",
}


@pytest.mark.parametrize("language", ASKED)
def test_a_question_within_another_text_is_seen(language: str) -> None:
    asked = ASKED[language]
    assert f"Q: {asked} OK!" in Overlap([asked], 13)
    assert f"Q: {asked} OK!" not in Overlap([asked], 0)


@pytest.mark.parametrize("language", ASKED)
def test_other_numbers_make_another_question(language: str) -> None:
    other = {"12": "21", "7": "5", "3": "8", "4": "6"}
    asked = ASKED[language]
    assert re.sub(r"\d+", lambda m: other[m[0]], asked) not in Overlap([asked], 13)


def test_words_and_signs_may_be_mixed() -> None:
    asked = "已知函数 f(x) = x^2 + 2x + 1，求 f(3) 的值。"  # noqa: RUF001
    assert f"解答下题：{asked}" in Overlap([asked], 13)  # noqa: RUF001
    assert asked.replace("2x", "4x").replace("f(3)", "f(5)") not in Overlap([asked], 13)
