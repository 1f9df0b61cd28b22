"""Sample voice-assistant exchanges (a request and its reply) from the sentence templates of home-assistant-intents.

The package holds, per language, templates such as ``turn on [the] lights in {area}`` and Jinja templates for the
replies, both written by Home Assistant's translators. Names of rooms and devices belong to each home, so the templates
leave them open; `WORDS` fills them.
"""

from __future__ import annotations

import datetime
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import SimpleNamespace
from typing import Any

import jinja2
from hassil.expression import Alternative, Expression, Group, ListReference, RuleReference, TextChunk
from hassil.parse_expression import parse_sentence

# Values of the open slots. `name` depends on the kind of device (Home Assistant's "domain").
WORDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "en": {
        "area": ["kitchen", "living room", "bedroom", "bathroom", "office", "garage", "hallway", "dining room",
                 "basement", "attic", "nursery", "guest room", "balcony", "laundry room"],
        "floor": ["first floor", "second floor", "third floor", "ground floor"],
        "item": ["milk", "eggs", "bread", "butter", "apples", "bananas", "rice", "coffee", "tea", "cheese", "tomatoes",
                 "onions", "chicken", "soap", "toothpaste", "orange juice", "water", "salt", "sugar", "noodles"],
        "timer_name": ["pizza", "pasta", "laundry", "tea", "bread", "egg", "homework", "nap"],
        "light": ["desk lamp", "floor lamp", "bedside lamp", "ceiling light", "reading lamp", "night light"],
        "switch": ["coffee machine", "heater", "kettle", "christmas tree", "pump"],
        "fan": ["ceiling fan", "desk fan", "exhaust fan"],
        "climate": ["thermostat", "air conditioner"],
        "media_player": ["tv", "speaker", "radio", "stereo"],
        "cover": ["garage door", "blinds", "left curtain", "right curtain"],
        "lock": ["front door", "back door", "gate"],
        "vacuum": ["robot vacuum", "rover"],
        "scene": ["movie time", "good night", "party"],
        "script": ["morning routine", "bedtime"],
        "todo": ["shopping", "homework", "chores"],
        "weather": ["london", "paris", "new york", "home"],
    },
    "zh_tw": {
        "area": ["廚房", "客廳", "臥室", "浴室", "書房", "車庫", "走廊", "餐廳", "地下室", "閣樓", "嬰兒房", "客房", "陽台", "洗衣間"],
        "floor": ["一樓", "二樓", "三樓", "頂樓"],
        "item": ["牛奶", "雞蛋", "麵包", "奶油", "蘋果", "香蕉", "白米", "咖啡", "茶葉", "起司", "番茄", "洋蔥", "雞肉", "肥皂",
                 "牙膏", "柳橙汁", "礦泉水", "鹽", "糖", "麵條"],
        "timer_name": ["披薩", "義大利麵", "洗衣", "泡茶", "麵包", "水煮蛋", "作業", "午睡"],
        "light": ["檯燈", "立燈", "床頭燈", "吸頂燈", "閱讀燈", "小夜燈"],
        "switch": ["咖啡機", "電暖器", "熱水壺", "聖誕樹", "抽水機"],
        "fan": ["吊扇", "桌扇", "抽風扇"],
        "climate": ["恆溫器", "冷氣"],
        "media_player": ["電視", "音響", "收音機", "喇叭"],
        "cover": ["車庫門", "百葉窗", "左邊窗簾", "右邊窗簾"],
        "lock": ["前門", "後門", "大門"],
        "vacuum": ["掃地機器人", "吸塵器"],
        "scene": ["電影時間", "晚安", "派對"],
        "script": ["早晨流程", "睡前流程"],
        "todo": ["購物", "作業", "家事"],
        "weather": ["台北", "高雄", "台中", "家裡"],
    },
    "ko": {
        "area": ["주방", "거실", "침실", "욕실", "서재", "차고", "복도", "식당", "지하실", "다락방", "아기방", "손님방", "베란다", "세탁실"],
        "floor": ["1층", "2층", "3층", "옥상"],
        "item": ["우유", "계란", "빵", "버터", "사과", "바나나", "쌀", "커피", "녹차", "치즈", "토마토", "양파", "닭고기", "비누",
                 "치약", "오렌지 주스", "생수", "소금", "설탕", "국수"],
        "timer_name": ["피자", "파스타", "빨래", "녹차", "빵", "계란", "숙제", "낮잠"],
        "light": ["책상등", "스탠드", "침대등", "천장등", "독서등", "수면등"],
        "switch": ["커피 머신", "히터", "전기 주전자", "크리스마스 트리", "펌프"],
        "fan": ["천장 선풍기", "선풍기", "환풍기"],
        "climate": ["온도 조절기", "에어컨"],
        "media_player": ["텔레비전", "스피커", "라디오", "오디오"],
        "cover": ["차고 문", "블라인드", "왼쪽 커튼", "오른쪽 커튼"],
        "lock": ["현관문", "뒷문", "대문"],
        "vacuum": ["로봇 청소기", "청소기"],
        "scene": ["영화 시간", "굿나잇", "파티"],
        "script": ["아침 준비", "취침 준비"],
        "todo": ["쇼핑", "숙제", "집안일"],
        "weather": ["서울", "부산", "대구", "우리 집"],
    },
}
# What an assistant can be asked in all three languages, and whose replies do not depend on a home we do not have.
INTENTS = (
    "HassCancelTimer",
    "HassClimateGetTemperature",
    "HassClimateSetTemperature",
    "HassGetCurrentDate",
    "HassGetCurrentTime",
    "HassLightSet",
    "HassMediaNext",
    "HassMediaPause",
    "HassMediaUnpause",
    "HassPauseTimer",
    "HassShoppingListAddItem",
    "HassStartTimer",
    "HassTurnOff",
    "HassTurnOn",
    "HassUnpauseTimer",
    "HassVacuumCleanArea",
)
_FILES = {"en": "en.json", "zh_tw": "zh-TW.json", "ko": "ko.json"}
_LIST_TO_WORDS = {"shopping_list_item": "item", "todo_list_item": "item"}


@dataclass(frozen=True)
class Exchange:
    """One request and its reply, both one line of NFC text."""

    prompt: str
    reply: str


class UnfillableError(Exception):
    """A template asks for something this module has no values for (a state, a free message)."""


@cache
def _parse(template: str) -> Expression:
    return parse_sentence(template).expression


class IntentSampler:
    """Draws random exchanges of one language; the same `rng` state gives the same exchanges."""

    def __init__(self, language: str, rng: random.Random) -> None:
        source = resources.files("home_assistant_intents") / "data" / _FILES[language]
        data = json.loads(source.read_text(encoding="utf-8"))
        self._rng = rng
        self._words = WORDS[language]
        self._lists: dict[str, dict[str, Any]] = data["lists"]
        self._rules: dict[str, str] = data["expansion_rules"]
        self._replies: dict[str, dict[str, str]] = data["responses"]["intents"]
        self._entries: dict[str, list[dict[str, Any]]] = {name: data["intents"][name]["data"] for name in INTENTS}
        self._compile = cache(jinja2.Environment(undefined=jinja2.StrictUndefined).from_string)

    def exchanges(self, attempts: int) -> Iterator[Exchange]:
        """Yield the exchanges of `attempts` draws whose templates could be filled; requests may repeat."""
        # Between "every intent as often" (drowns in fixed phrases) and "every template as often" (drowns in timers).
        weights = [len(self._entries[intent]) ** 0.5 for intent in INTENTS]
        for _ in range(attempts):
            intent = self._rng.choices(INTENTS, weights)[0]
            try:
                yield self._draw(intent, self._rng.choice(self._entries[intent]))
            except (UnfillableError, jinja2.TemplateError, TypeError, ValueError):
                continue

    def _draw(self, intent: str, entry: Mapping[str, Any]) -> Exchange:
        domains = entry.get("requires_context", {}).get("domain", entry.get("slots", {}).get("domain", []))
        domains = [domains] if isinstance(domains, str) else list(domains)
        known = [domain for domain in domains if domain in self._words]
        if domains and not known:
            raise UnfillableError(f"no names for {domains}")
        domain = self._rng.choice(known) if known else ""
        slots: dict[str, str] = {}
        template = self._rng.choice(entry["sentences"])
        prompt = _tidy(self._expand(_parse(template), slots, domain))
        reply = _tidy(self._render(intent, entry.get("response", "default"), slots, domain))
        if not prompt or not reply:
            raise UnfillableError("nothing left to say")
        return Exchange(prompt[0].upper() + prompt[1:], reply[0].upper() + reply[1:])

    def _expand(self, node: Expression, slots: dict[str, str], domain: str) -> str:
        """One random reading of a template; values chosen for `{slot}` are written into `slots`."""
        if isinstance(node, TextChunk):
            return node.original_text
        if isinstance(node, Alternative):
            return self._expand(self._rng.choice(node.items), slots, domain)
        if isinstance(node, Group):
            return "".join(self._expand(item, slots, domain) for item in node.items)
        if isinstance(node, RuleReference):
            if node.rule_name not in self._rules:
                raise UnfillableError(node.rule_name)
            return self._expand(_parse(self._rules[node.rule_name]), slots, domain)
        assert isinstance(node, ListReference)
        value = self._value(node.list_name, domain)
        slots[node.slot_name] = value
        return value

    def _value(self, list_name: str, domain: str) -> str:
        key = domain if list_name == "name" else _LIST_TO_WORDS.get(list_name, list_name)
        if key in self._words:
            return self._rng.choice(self._words[key])
        spec = self._lists.get(list_name, {})
        if "range" in spec:
            start, stop = spec["range"]["from"], spec["range"]["to"]
            if list_name == "temperature":
                start, stop = 16, 30  # what people set at home; the full range is 0 to 100
            return str(self._rng.randrange(start, stop + 1, spec["range"].get("step", 1)))
        if "values" in spec:
            value = self._rng.choice(spec["values"])
            return _tidy(self._expand(_parse(value["in"] if isinstance(value, dict) else value), {}, domain))
        raise UnfillableError(list_name)

    def _render(self, intent: str, key: str, slots: Mapping[str, str], domain: str) -> str:
        template = self._replies[intent].get(key)
        if template is None:
            raise UnfillableError(f"{intent} has no reply {key!r}")
        rng = self._rng
        moment = datetime.datetime(2024, 1, 1) + datetime.timedelta(minutes=rng.randrange(3 * 365 * 24 * 60))
        devices = [SimpleNamespace(name=name) for name in rng.sample(self._words["area"], 2)]
        state = SimpleNamespace(domain=domain, entity_id="", state=rng.randint(14, 31))
        return self._compile(template).render(
            slots={**slots, "time": moment, "date": moment, "canceled": rng.randrange(4)},
            state=state,
            query=SimpleNamespace(matched=devices[: rng.randrange(3)], unmatched=devices[1:]),
            state_attr=lambda entity_id, name: state.state,
        )


def _tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
