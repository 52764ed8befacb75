"""Small tokenizers of every kind that can be cut, and text in many languages for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from llmprune.formats.gguf_tokenizer import _LLAMA3

LANGUAGES = (
    "The river was wide and slow, and the boats on it were older than the town. The town was older than the bridge.",
    "Der Fluss war breit und langsam, und die Brücke über ihn hieß früher anders als heute; größer war sie nie.",
    "Où est la bibliothèque ? L'été, on lit dehors ; l'hiver, près du poêle, même à Noël.",
    "El río era ancho y lento. ¿Quién recuerda el nombre del puente? ¡Nadie, señor!",
    "Река была широкой и медленной, и лодки на ней были старше города и старше моста.",
    "Ο ποταμός ήταν πλατύς και αργός, και οι βάρκες πιο παλιές από την πόλη.",
    "河は広くてゆっくり流れ、舟は町よりも古かった。橋の名前は誰も覚えていない。",
    "河又宽又慢，船比城还老。没有人记得桥的名字。",
    "강은 넓고 느렸으며 배들은 마을보다 오래되었다.",
    "كان النهر واسعًا وبطيئًا، وكانت القوارب أقدم من المدينة.",
    "נהר רחב ואיטי, והסירות עתיקות מן העיר.",
    "नदी चौड़ी और धीमी थी, और नावें शहर से पुरानी थीं।",
    "แม่น้ำกว้างและไหลช้า เรือเก่าแก่กว่าเมือง",
    "Dòng sông rộng và chậm, những con thuyền còn cũ hơn cả thị trấn.",
    "def older(town, boats):\n    return [boat for boat in boats if boat.age > town.age]  # 12345\n\n\n",
    "🙂🇫🇷👩‍👩‍👧 ½ ٣٤ \u200d\ufeff\u2028 \t\r\n  e\u0301 ﬁ ▁ ▁▁ <0x41> \x00\x7f",
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
USERS = ["<|user|>", "<tool call>"]
"""One that is special, and one that is not."""
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}</s>{% endfor %}"


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of any Unicode characters but surrogates, with words of the languages between."""
    rng = random.Random(seed)
    words = " ".join(LANGUAGES).split(" ")

    def character() -> str:
        top = rng.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF))
        while 0xD800 <= (point := rng.randint(0, top)) <= 0xDFFF:
            pass
        return chr(point)

    def part() -> str:
        return rng.choice((character, character, lambda: rng.choice(words), lambda: " " * rng.randint(1, 4)))()

    return ["".join(part() for _ in range(rng.randint(0, 12))) for _ in range(count)]


def _trainer(size: int, specials: list[str], alphabet: list[str] | None = None) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet or [], show_progress=False
    )


def _finished(data: dict[str, object]) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(json.dumps(data))
    backend.add_special_tokens([USERS[0]])
    backend.add_tokens([AddedToken(USERS[1], normalized=False, lstrip=True)])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", start)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[USERS[0]],
        model_max_length=77,
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def _byte_level(ignore_merges: bool) -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    as_llama3 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), bytes_only])
    tokenizer.pre_tokenizer = as_llama3 if ignore_merges else words
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LANGUAGES * 2, _trainer(900, SPECIAL, alphabet))
    return tokenizer.to_str()


def byte_level(ignore_merges: bool = False, lacking: str = "") -> PreTrainedTokenizerFast:
    """As Llama 3's (which takes whole words without merging) or GPT-2's; some bytes may be no tokens (SmolLM's)."""
    data = json.loads(_byte_level(ignore_merges))
    vocab = data["model"]["vocab"]
    left = [text for text in vocab if not set(text) & set(lacking) or text in SPECIAL]
    data["model"]["vocab"] = {text: token for token, text in enumerate(left)}
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if all(text in left for text in pair)]
    return _finished(data)


def whole_words_only() -> PreTrainedTokenizerFast:
    """As Llama 3's, with words among its tokens that no merges build."""
    data = json.loads(_byte_level(True))
    vocab = data["model"]["vocab"]
    vocab |= {word: len(vocab) + at for at, word in enumerate(("Ġolder", "Ġqqqq", "Ġbridge"), 0) if word not in vocab}
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    data["model"]["vocab"] = {text: token for token, text in enumerate(vocab)}
    return _finished(data)


@cache
def _characters(size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(LANGUAGES * 2, _trainer(size, SPECIAL))
    return tokenizer.to_str()


def sentencepiece_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary like Llama 2's: bytes, merged pieces, characters last; and all pairs that make a piece."""
    trained = json.loads(_characters(900))["model"]["vocab"]
    pieces = [text for text in trained if text not in SPECIAL]
    merged, single = [text for text in pieces if len(text) > 1], [text for text in pieces if len(text) == 1]
    order = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *single]
    vocab = {text: token for token, text in enumerate(order)}
    splits = ((text[:at], text[at:]) for text in merged for at in range(1, len(text)))
    pieces_of = vocab.keys() - {f"<0x{byte:02X}>" for byte in range(256)}
    return vocab, [(left, right) for left, right in splits if left in pieces_of and right in pieces_of]


def sentencepiece() -> PreTrainedTokenizerFast:
    vocab, merges = sentencepiece_parts()
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return _finished(json.loads(tokenizer.to_str()))


@cache
def _unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    # Without some of the languages, so that some characters are unknown.
    texts = [text for at, text in enumerate(LANGUAGES) if at not in (8, 11)] * 20
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def unigram(byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    data = json.loads(_unigram())
    if byte_fallback:
        bytes_ = [[f"<0x{byte:02X}>", -100.0] for byte in range(256)]
        data["model"]["vocab"] = [*data["model"]["vocab"][: len(SPECIAL)], *bytes_, *data["model"]["vocab"][4:]]
        data["model"]["byte_fallback"] = True
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        pattern = Tokenizer(models.BPE())
        pattern.decoder = decoders.Sequence(steps)
        data["decoder"] = json.loads(pattern.to_str())["decoder"]
    return _finished(data)


def gpt2() -> GPT2Tokenizer:
    model = json.loads(_byte_level(False))["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    return GPT2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])  # type: ignore[no-untyped-call]


def llama() -> LlamaTokenizer:
    vocab, merges = sentencepiece_parts()
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)  # type: ignore[no-untyped-call]


def gemma() -> GemmaTokenizer:
    vocab, merges = sentencepiece_parts()
    renamed = {"<s>": "<bos>", "</s>": "<eos>"}
    vocab = {renamed.get(text, text): token for text, token in vocab.items()}
    vocab["<mask>"] = len(vocab)
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)  # type: ignore[no-untyped-call]


def t5() -> T5Tokenizer:
    pieces = [(text, score) for text, score in json.loads(_unigram())["model"]["vocab"] if text not in SPECIAL]
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*head, *pieces], extra_ids=3)  # type: ignore[no-untyped-call]


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, whole words": lambda: byte_level(ignore_merges=True),
    "byte-level, words without merges": whole_words_only,
    "byte-level, bytes lacking": lambda: byte_level(lacking="ÐĀzB"),
    "byte fallback": sentencepiece,
    "unigram": unigram,
    "unigram, byte fallback": lambda: unigram(byte_fallback=True),
    "GPT-2": gpt2,
    "Llama": llama,
    "Gemma": gemma,
    "T5": t5,
}
