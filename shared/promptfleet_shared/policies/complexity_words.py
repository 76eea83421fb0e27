# ruff: noqa: RUF001 - words of many alphabets
"""The words and phrases by which prompts tell what they need, in a dozen languages.

Each is looked for in the prompt's words, in lower case, joined by single spaces and with a space
in front: ` prove` finds "prove" and "proves", never "improve". Languages that put no spaces between
words have their phrases without one.
"""

from __future__ import annotations

REASONING: tuple[str, ...] = (
    " why ", " prove", " proof", " derive", " deduce", " infer ", " explain", " discuss",
    " describe how", " describe the", " differences between", " difference between",
    " relationship", " correlation", " impact", " insights", " strateg", " suppose ", " assume ",
    " how does ", " how do ", " how can ", " how did ", " how would ", " which of ", " if you ",
    " if a ", " if the ", " older than ", " more than ", " less than ", " greater than ",
    " at least ", " twice ", " half ", " area of ", " value of ", " role of ", " differentiate",
    " identify", " propose", " assess", " step by step", " analyse", " analyze", " analysis",
    " evaluate", " compare", " contrast ", " trade off", " tradeoff", " pros and cons", " solve",
    " calculate", " compute ", " how many ", " how much ", " probability", " equation",
    " determine", " optimi", " debug", " root cause", " reason ", " reasoning", " justify",
    " critique", " hypothes", " what would happen", " design a", " architecture", " complexity",
    " logic", " puzzle", " riddle", " remainder", " given that ", " if and only if",
    " counterexample", " implications", " consequences", " warum ", " beweis", " herleite",
    " leite her", " schritt für schritt", " analysier", " vergleich", " begründe", " berechne",
    " löse ", " bewerte", " ursache", " wieviele ", " wie viele ", " wahrscheinlichkeit",
    " gleichung", " schlussfolger", " erklär", " wenn ", " vor und nachteile", " abwäg",
    " pourquoi ", " prouve", " démontre", " étape par étape", " justifie", " calcule", " résou",
    " évalue", " combien ", " probabilité", " équation", " déduis", " expliqu", " si un ",
    " avantages et inconvénients", " por qué ", " por que ", " porqué ", " demuestr", " demonstr",
    " paso a paso", " passo a passo", " analiza", " analisa", " analise", " justifica",
    " calcula", " explica", " explique", " resuelv", " resolv", " cuánt", " quant",
    " probabilidad", " ecuación", " equação", " razona", " compara", " ventajas y desventajas",
    " vantagens e desvantagens", " deduc", " evalúa", " avali", " perché ", " dimostra",
    " passo dopo passo", " analizza", " confronta", " calcola", " risolvi", " quanti ",
    " probabilità", " equazione", " ragiona", " spiega", " valuta ", " pro e contro", " waarom ",
    " bewijs", " stap voor stap", " analyseer", " bereken", " los op ", " hoeveel ", " vergelijk",
    " beoordeel", " voor en nadelen", " beredeneer", " leg uit", " dlaczego ", " udowodnij",
    " krok po kroku", " oblicz", " rozwiąż", " porównaj", " przeanalizuj", " wyjaśnij", " açıkla",
    " jelaskan", " giải thích", " neden ", " niçin ", " kanıtla", " adım adım", " hesapla",
    " karşılaştır", " analiz et", " mengapa ", " kenapa ", " buktikan", " langkah demi langkah",
    " hitung", " bandingkan", " tại sao ", " chứng minh", " từng bước", " so sánh", " phân tích",
    " giải ", " почему ", " докажи", " доказат", " шаг за шагом", " пошагово", " проанализируй",
    " анализ", " сравни", " вычисли", " рассчита", " реши ", " решите", " сколько ",
    " вероятност", " уравнени", " обоснуй", " объясни", " чому ", " доведи", " порівняй",
    " обчисли", " لماذا ", " اثبت", " أثبت", " خطوة بخطوة", " حلل", " قارن", " احسب", " كم ",
    " معادلة", " احتمال", " क्यों ", " समझा", " اشرح", " הסבר", " सिद्ध", " चरण दर चरण",
    " विश्लेषण", " तुलना", " गणना", " हल करें", " कितने ", " कितना ", " למה ", " מדוע ", " הוכח",
    " צעד אחר צעד", " נתח", " השווה", " חשב", "为什么", "為什麼", "证明", "證明", "推导", "推導",
    "一步一步", "逐步", "分析", "比较", "比較", "计算", "計算", "求解", "解方程", "概率", "原因",
    "推理", "多少", "评估", "解释", "解釋", "如果", "讨论", "討論", "说明", "說明", "優缺點",
    "优缺点", "なぜ", "どうして", "証明", "段階的", "ステップごと", "解いて", "確率", "理由",
    "いくつ", "評価", "説明して", "もし", "왜 ", "증명", "단계별", "비교", "계산", "풀어", "확률",
    "이유", "추론", "몇 ", "평가", "설명", "만약",
)  # fmt: skip

CREATIVITY: tuple[str, ...] = (
    " write a story", " short story", " story ", " poem", " poetry", " haiku", " limerick",
    " lyrics", " song ", " novel ", " fiction", " imagine", " pretend", " role play", " roleplay",
    " act as ", " blog post", " essay", " brainstorm", " creative", " slogan", " metaphor",
    " screenplay", " dialogue", " compose ", " persuasive", " vivid", " humor", " funny", " joke",
    " character", " take on the", " you are a ", " in the style of", " picture yourself",
    " embrace the role", " assume the role", " embody", " engaging", " tagline", " fairy tale",
    " draft a", " plot", " gedicht", " geschichte", " märchen", " erfinde", " kreativ",
    " stell dir vor", " aufsatz", " schreibe eine", " roman", " liedtext", " witz", " poème",
    " histoire", " conte ", " invente", " créati", " rédige", " chanson", " poema", " cuento",
    " historia", " história", " imagina", " inventa", " creativ", " criativ", " canción",
    " escribe un", " escreva um", " ensayo", " redação", " poesia", " racconto", " storia",
    " immagina", " scrivi un", " canzone", " verhaal", " verzin", " stel je voor", " liedje",
    " wiersz", " opowiadanie", " wyobraź", " şiir", " hikaye", " hayal", " puisi", " cerita",
    " bayangkan", " bài thơ", " câu chuyện", " tưởng tượng", " стих", " рассказ", " сказк",
    " сочини", " придумай", " представь", " эссе", " песн", " вірш", " قصيدة", " قصة", " تخيل",
    " اكتب", " कविता", " कहानी", " कल्पना", " שיר", " סיפור", " דמיין", "写一首", "写一篇",
    "写诗", "故事", "小说", "小說", "想象", "想像", "创作", "創作", "作文", "诗", "詩", "物語",
    "小説", "俳句", "書いて", "キャッチコピー", "歌詞", "이야기", "소설", "상상", "써줘",
    "작성해", "창작", "에세이",
)  # fmt: skip

CODE: tuple[str, ...] = (
    " python", " javascript", " typescript", " java ", " c program", " golang", " rust ", " sql ",
    " html", " css ", " regex", " regular expression", " algorithm", " function ", " source code",
    " code ", " script ", " compile", " unit test", " refactor", " api ", " bash ", " docker",
    " kubernetes", " class ", " array", " linked list", " binary tree", " recursion",
    " implement", " database", " query", " stack trace", " exception", " program ", " programm",
    " algorithmus", " funktion", " algorithme", " fonction", " algoritmo", " función", " código",
    " funzione", " codice", " алгоритм", " функци", " код ", " программ", "算法", "函数", "代码",
    "演算法", "程式", "アルゴリズム", "関数", "コード", "プログラム", "알고리즘", "함수", "코드",
    "프로그램", " خوارزمية", " कोड",
)  # fmt: skip

SIMPLE: tuple[str, ...] = (
    " what is ", " what s ", " who is ", " who was ", " when did ", " when was ", " where is ",
    " define ", " translate", " spell ", " capital of ", " synonym", " list the ", " name the ",
    " classify", " extract", " summari", " rephrase", " correct the", " fix the grammar",
    " hello", " hi ", " thanks", " thank you", " convert ", " yes or no", " was ist ",
    " wer ist ", " wer war ", " wann ", " wo ist ", " übersetz", " hauptstadt", " hallo",
    " danke", " fasse zusammen", " nenne ", " korrigiere", " qu est ce que", " qui est ",
    " quand ", " où ", " tradui", " capitale", " bonjour", " merci", " résume", " corrige",
    " qué es ", " quién ", " cuándo ", " dónde ", " traduc", " capital de ", " hola ", " gracias",
    " resum", " o que é ", " quem ", " onde ", " quando ", " traduz", " olá ", " obrigad",
    " cos è ", " chi è ", " traduci", " riassumi", " ciao ", " wat is ", " wie is ", " vertaal",
    " co to ", " kto ", " przetłumacz", " nedir", " çevir", " apa itu", " terjemah", " là gì",
    " что такое", " кто ", " когда ", " где ", " переведи", " столица", " привет", " спасибо",
    " що таке", " ما هو", " ما هي", " من هو", " ترجم", " مرحبا", " क्या है", " कौन ", " अनुवाद",
    " नमस्ते", " מה זה", "什么是", "什麼是", "是什么", "谁是", "翻译", "翻譯", "首都", "你好",
    "谢谢", "总结", "總結", "とは", "誰", "翻訳", "こんにちは", "ありがとう", "要約", "무엇",
    "누구", "번역", "수도", "안녕", "요약",
)  # fmt: skip
