"""Conversations and what a model wrote itself as texts to compare on, and whether the order of
files depends on the text."""

import subprocess

import numpy as np
import pandas as pd
import pytest
from models import tiny_model

from llamatelemetry import InferenceEngine, quantize
from llamatelemetry.compare import agreement, chats
from llamatelemetry.compare.comparison import Comparison, compare_quantizations
from llamatelemetry.compare.worker import windows
from llamatelemetry.errors import CompareError
from llamatelemetry.files.gguf import GGUFFile
from llamatelemetry.files.programs import tool

TALK = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! <b>"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def turns(*pairs):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs)


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "no conversations"),
        (["Hi"], "A conversation is a list"),
        ([[]], "A conversation is a list"),
        ([["Hi"]], "A message is"),
        ([[{"role": "user"}]], "A message is"),
        ([[{"role": "user", "content": 3}]], "A text is a str"),
    ],
)
def test_what_is_no_conversation_is_refused(given, said):
    with pytest.raises(CompareError, match=said):
        chats.chat_text("no model is looked at", given)


@pytest.fixture(scope="module")
def tiny(smollm2, llama_server, tmp_path_factory):
    """Random weights with SmolLM2's tokenizer and template."""
    folder = tmp_path_factory.mktemp("chats")
    return tiny_model("llama", folder, vocabulary=GGUFFile(smollm2), n_layer=1, n_ctx=2048)


@pytest.mark.slow
def test_conversations_are_rendered_by_the_models_own_template_and_read_whole(tiny, tmp_path):
    text = chats.chat_text(tiny, TALK)
    first = ("system", SYSTEM), ("user", "Hi"), ("assistant", "Hello! <b>")
    assert text == turns(*first) + turns(("system", "Be brief."), ("user", "Why?"))
    many = TALK * 20
    q4 = quantize(tiny, tmp_path / "Q4_0.gguf", "Q4_0", progress=False)
    ask = dict(n_ctx=64, max_windows=2, progress=False)
    found = compare_quantizations(tiny, q4, many, **ask)
    # llama.cpp's own tokenizer, special tokens parsed
    file = tmp_path / "text.txt"
    file.write_text(chats.chat_text(tiny, many))
    command = [tool("llama-tokenize"), "-m", tiny, "-f", file, "--ids", "--log-disable"]
    ids = np.array(eval(subprocess.run(command, capture_output=True, text=True).stdout))
    own = windows(ids, 64, 2)
    assert found.tokens["id"].tolist() == own[:, 33:].ravel().tolist()
    starts = GGUFFile(tiny).metadata["tokenizer.ggml.tokens"].index("<|im_start|>")
    assert (own == starts).sum() > 4
    # The same text as a str is another: nothing in it is a special token
    plain = compare_quantizations(tiny, q4, str(chats.chat_text(tiny, many)), **ask)
    assert starts not in plain.tokens["id"].tolist()
    with InferenceEngine() as engine:
        engine.load_model(tiny, auto_start=False, silent=True)
        scored = engine.score(own[0]).query("position >= 33")["logprob"].to_numpy()
    theirs = found.tokens.query("window == 0")["logprob_base"]
    assert scored == pytest.approx(theirs.to_numpy(), abs=2e-3)


@pytest.mark.slow
def test_what_a_model_wrote_itself(tiny):
    ask = dict(n_tokens=12, seed=3)
    wrote = chats.written_by(tiny, [TALK[1], "Call me"], **ask)
    assert isinstance(wrote, chats.Special)
    begin = turns(("system", "Be brief."), ("user", "Why?")) + "<|im_start|>assistant\n"
    assert wrote.startswith(begin) and "<|im_end|>\nCall me" in wrote[len(begin) :]
    assert wrote == chats.written_by(tiny, [TALK[1], "Call me"], **ask)
    assert wrote != chats.written_by(tiny, [TALK[1], "Call me"], n_tokens=12, seed=4)
    kinds = chats.texts(tiny, "One.\n\nTwo.\n\n\nThree.\n\nFour.\n\nFive.", prompts=1, n_tokens=4)
    paired = [("user", "One."), ("assistant", "Two.")], [("user", "Three."), ("assistant", "Four.")]
    assert kinds["as a chat"] == "".join(turns(("system", SYSTEM), *pair) for pair in paired)
    assert chats.PROMPTS[0][0]["content"] in kinds["written by the reference"]
    assert list(chats.texts(tiny, "One.", prompts=1, n_tokens=4)) == ["written by the reference"]
    with pytest.raises(CompareError, match="no prompts"):
        chats.written_by(tiny, [])


@pytest.mark.slow
def test_a_text_is_no_longer_than_what_is_read_of_it(tiny):
    text = "One.\n\nTwo.\n\nThree.\n\nFour."

    def texts(**options):
        return chats.texts(tiny, text, **dict(prompts=2, n_tokens=4) | options)

    whole, least = texts(), texts(enough=1)
    with chats._serving(tiny, None) as engine:
        for name, first in least.items():
            assert whole[name].startswith(first) and first.count("<|im_start|>user") == 1
            length = chats._length(engine, first)
            assert length < chats._length(engine, whole[name])
            assert texts(enough=length)[name] == first
            assert texts(enough=length + 1)[name] == whole[name]


def comparison(values):
    """{name: KLD of (window, token)} as a Comparison."""
    tokens = pd.concat(
        pd.DataFrame(
            {"candidate": name, "kld": np.ravel(one), "window": np.repeat(range(8), len(one[0]))}
        )
        for name, one in values.items()
    )
    rows = {name: {"kld_mean": np.mean(one)} for name, one in values.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")
    for column in ("kld_mean_low", "kld_mean_high", "ppl_base", "same_top", "n_tokens"):
        table[column] = 1.0
    found = Comparison(table)
    object.__setattr__(found, "tokens", tokens)
    return found


def test_whether_the_order_depends_on_the_text():
    rng = np.random.default_rng(0)

    def near(mean):
        return mean + rng.normal(0, 0.001, (8, 5))

    book = comparison({"a": near(0.1), "b": near(0.2), "c": near(0.3), "d": near(0.3)})
    chat = comparison({"a": near(0.3), "b": near(0.1), "c": near(0.4), "d": near(0.4)})
    found = {"book": book, "chat": chat}
    pairs = agreement.order(found)
    assert pairs.loc[("a", "b")].tolist() == ["less", "more", True]
    assert pairs.loc[("a", "c")].tolist() == ["less", "less", False]
    assert pairs["depends"].sum() == 1 and len(pairs) == 6
    assert not agreement.order(found, floor=0.15).loc[("a", "b"), "depends"]
    table = agreement.by_text(found)
    assert table.loc[("chat", "b"), "rank"] == 1 and table.loc[("book", "b"), "rank"] == 2
    tau = agreement.rank_agreement(found)
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.kendalltau(book["kld_mean"], chat["kld_mean"]).statistic
    assert tau.loc["book", "chat"] == pytest.approx(wanted) and tau.loc["book", "book"] == 1
    one = {"book": book.iloc[:1].pipe(lambda f: comparison({"a": near(1)})), "chat": chat}
    assert agreement.order(one).empty
