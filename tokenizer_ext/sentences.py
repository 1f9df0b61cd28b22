"""A few plain sentences in languages that a user may have no text of, written for this purpose.

They show how an extension changes the languages that share its scripts, and give
`cpt-merge check-tokenizer` something to read.
"""

SENTENCES: dict[str, list[str]] = {
    "en": [
        "The library opens at nine, and it closes at six on weekdays.",
        "She didn't say why; perhaps she'd forgotten her keys (again).",
        "Prices rose by 3.5% in 2023, to about $1,200 per tonne.",
        "Please send the report to j.smith@example.org before Friday.",
        "If it rains tomorrow, we'll stay at home and read.",
        'He asked, "Is this seat taken?" and sat down anyway.',
        "Water boils at 100 °C at sea level.",
        "Two of the three bridges were closed for repairs last winter.",
    ],
    "zh_tw": [
        "圖書館早上九點開門，平日晚上六點關門。",
        "她沒有說明原因，也許又忘了帶鑰匙。",
        "二〇二三年的價格上漲了百分之三點五。",
        "請在星期五以前把報告寄給我們。",
        "如果明天下雨，我們就留在家裡看書。",
        "他問：「這個位子有人坐嗎？」然後就坐下來了。",
        "水在海平面上加熱到一百度會沸騰。",
        "去年冬天，三座橋之中有兩座因為整修而關閉。",
    ],
    "zh_cn": [
        "图书馆早上九点开门，平日晚上六点关门。",
        "她没有说明原因，也许又忘了带钥匙。",
        "二〇二三年的价格上涨了百分之三点五。",
        "请在星期五以前把报告寄给我们。",
        "如果明天下雨，我们就留在家里看书。",
        "他问：“这个座位有人坐吗？”然后就坐下来了。",
        "水在海平面上加热到一百度会沸腾。",
        "去年冬天，三座桥之中有两座因为维修而关闭。",
    ],
    "ja": [
        "図書館は朝九時に開き、平日は夕方六時に閉まります。",
        "彼女は理由を言いませんでした。また鍵を忘れたのかもしれません。",
        "二〇二三年には価格が三・五パーセント上がりました。",
        "金曜日までに報告書を送ってください。",
        "明日雨が降ったら、家で本を読みましょう。",
        "「この席は空いていますか」と聞いて、彼は座りました。",
        "海面の高さでは水は百度で沸騰します。",
        "コーヒーとケーキを二つずつお願いします。",
    ],
    "ko": [
        "도서관은 아침 아홉 시에 열고 평일에는 저녁 여섯 시에 닫습니다.",
        "그녀는 이유를 말하지 않았다. 아마 또 열쇠를 잊었을 것이다.",
        "2023년에 가격이 3.5퍼센트 올랐습니다.",
        "금요일까지 보고서를 보내 주시기 바랍니다.",
        "내일 비가 오면 집에서 책을 읽읍시다.",
        '그는 "이 자리 비었나요?" 하고 묻고는 앉았다.',
        "바닷가에서는 물이 백 도에서 끓습니다.",
        "지난겨울에는 다리 셋 가운데 둘이 수리 때문에 닫혀 있었다.",
    ],
}
