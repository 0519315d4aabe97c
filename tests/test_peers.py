"""The peers of `taleloom bench --peers` do the work they are timed for."""

import ctypes
import sys

import pytest
import torch

from model import peers
from model.checkpoint import load_decoder
from model.config import SamplingParams
from model.errors import ModelError, TaleloomError
from model.hub.export import export_gguf
from model.sampling import next_token_probabilities
from model.tokenizer import Tokenizer

N_TOKENS = 24


@pytest.fixture
def prompt(bundled) -> list[int]:
    return Tokenizer.load(bundled).encode_opening("Once upon a time, there was a")


@pytest.fixture
def gguf_path(bundled, tmp_path):
    pytest.importorskip("llama_cpp")
    export_gguf(bundled, tmp_path / "b.gguf", "f32")
    return tmp_path / "b.gguf"


@pytest.mark.parametrize("module", ["transformers", "llama_cpp"])
def test_a_missing_peer_says_how_to_install_it(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    factory = getattr(peers, f"{module}_generate")
    with pytest.raises(TaleloomError, match=r"taleloom\[bench\]"):
        factory(tmp_path, [1], 1)


def test_transformers_writes_every_token(bundled, prompt):
    generate = peers.transformers_generate(bundled, prompt, N_TOKENS)
    assert generate(1) > 0 and generate(3) > 0


def test_llama_cpp_takes_time_for_any_number_of_rows_again_and_again(gguf_path, prompt, capfd):
    generate = peers.llama_cpp_generate(gguf_path, prompt, N_TOKENS)
    assert all(generate(n_rows) > 0 for n_rows in (1, 16, 1, 3, 16))
    captured = capfd.readouterr()
    assert not captured.out and not captured.err


def test_a_file_that_is_no_gguf_is_named(tmp_path, prompt, capfd):
    pytest.importorskip("llama_cpp")
    (tmp_path / "b.gguf").write_text("no model")
    with pytest.raises(ModelError, match=r"b\.gguf"):
        peers.llama_cpp_generate(tmp_path / "b.gguf", prompt, N_TOKENS)
    assert not capfd.readouterr().err


def test_llama_cpp_tells_stories_of_its_own_in_every_row(gguf_path, bundled, prompt, monkeypatch):
    """Full length, past their ends; another story in each row and call; each likely to the float32 decoder."""
    told = []
    tell = peers._llama_tell
    monkeypatch.setattr(peers, "_llama_tell", lambda *arguments: told.append(tell(*arguments)))
    generate = peers.llama_cpp_generate(gguf_path, prompt, 200)
    for n_rows in (4, 1, 4):
        generate(n_rows)
    rows = [row for stories in told for row in stories]
    assert [len(row) for row in rows] == [200] * 9
    assert len({tuple(row) for row in rows}) == 9
    assert any(2 in row for row in rows)  # </s>
    decoder = load_decoder(bundled)
    with torch.inference_mode():
        logits_btv = decoder(torch.tensor([prompt + row for row in rows]))[:, len(prompt) - 1 : -1]
    ids_bt1 = torch.tensor(rows).unsqueeze(-1)
    nats = -logits_btv.log_softmax(-1).gather(-1, ids_bt1)[:, :60].mean()
    assert nats < 2, "a story of another model, or of mixed-up rows, is not likely"


def test_llama_cpp_samples_as_we_do(gguf_path, bundled, prompt):
    """The filters keep the same pieces with the same probabilities, by llama.cpp's own account of one step."""
    import llama_cpp

    logits_v = load_decoder(bundled)(torch.tensor([prompt]))[0, -1].detach()
    params = SamplingParams()
    columns = [torch.tensor([value]) for value in (params.temperature, params.top_k, params.top_p, params.min_p)]
    ours, ids = next_token_probabilities(logits_v.unsqueeze(0).double(), *columns)
    candidates = (llama_cpp.llama_token_data * len(logits_v))()
    for i, logit in enumerate(logits_v.tolist()):
        candidates[i] = llama_cpp.llama_token_data(i, logit, 0.0)
    array = llama_cpp.llama_token_data_array(candidates, len(logits_v), -1, False)
    sampler = peers._llama_sampler(llama_cpp, 1)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    theirs = {array.data[i].id: array.data[i].p for i in range(array.size)}
    kept = {int(i): float(p) for i, p in zip(ids[0], ours[0], strict=True) if p > 0}
    assert theirs.keys() == kept.keys()
    assert all(theirs[i] == pytest.approx(kept[i], abs=1e-5) for i in kept)
    llama_cpp.llama_sampler_free(sampler)
