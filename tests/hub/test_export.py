"""What goes out is the same storyteller: read back, opened in `transformers`, and opened in llama.cpp."""

import json
import re
import shutil
import string
import subprocess
import sys
from itertools import islice

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType, TokenType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.checkpoint import load_decoder, read_config
from model.cli import main
from model.errors import InputError, ModelError
from model.hub.export import export_gguf, export_hf
from model.tokenizer import Tokenizer

PROMPTS = [
    "Once upon a time, there was a",
    "Tom had a red kite. One day, the wind",
    '"Where is my hat?" asked the old owl.\n',
    "A café in Zürich was full of 🦊s.",
]
N_TOKENS = 64


def greedy(decoder, ids: list[int], n_tokens: int) -> list[int]:
    """The reference: ids and the likeliest continuation, without a cache, in float32."""
    tokens_bt = torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(n_tokens):
            tokens_bt = torch.cat([tokens_bt, decoder(tokens_bt)[:, -1:].argmax(-1)], dim=1)
    return tokens_bt[0].tolist()


def fields_of(reader: gguf.GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def as_here(name: str, rows: np.ndarray, config) -> np.ndarray:
    """A query or key projection's rows in our order, head by head: llama.cpp's 2i is our i, its 2i + 1 our i + k/2."""
    if not re.search(r"attn_[qk]\.", name):
        return rows
    heads = rows.reshape(-1, config.head_dim, rows.shape[1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(rows.shape)


OUR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def our_name(name: str) -> str:
    *block, part, suffix = name.split(".")
    return ".".join(["model.layers", block[1], OUR_NAMES[part], suffix] if block else [OUR_NAMES[part], suffix])


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


def rewrite(folder, **fields) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **fields}))


# --- GGUF, read back ---


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 0), ("f16", 0), ("q8_0", 1 / 220)])
def test_a_gguf_holds_our_weights(bundled, tmp_path, kind, tolerance):
    """float16 holds the bundled weights exactly; q8_0 is off by half a step of 1/127 and its scale's float16."""
    export_gguf(bundled, tmp_path / "b.gguf", kind)
    config, ours = read_config(bundled), load_file(bundled / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert {our_name(tensor.name) for tensor in reader.tensors} == set(ours)
    for tensor in reader.tensors:
        expected = ours[our_name(tensor.name)].float().numpy()
        if expected.ndim == 1:
            assert tensor.tensor_type == GGMLQuantizationType.F32
        else:
            assert tensor.tensor_type == GGMLQuantizationType[kind.upper()]
        found = as_here(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type), config)
        assert found.shape == expected.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_a_gguf_says_what_the_model_is(bundled, tmp_path):
    export_gguf(bundled, tmp_path / "new" / "b.gguf", "q8_0")
    fields = fields_of(gguf.GGUFReader(tmp_path / "new" / "b.gguf"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.gguf"]
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "Llama-Taleloom-11M"
    assert fields["general.license"] == "other"
    assert fields["general.license.name"] == "apache-2.0-with-llama-3.1-community-terms"
    assert fields["general.license.link"].startswith("https://")
    assert fields["general.file_type"] == 7
    config = read_config(bundled)
    assert fields["llama.context_length"] == config.max_position_embeddings
    assert fields["llama.embedding_length"] == config.hidden_size
    assert fields["llama.feed_forward_length"] == config.intermediate_size
    assert fields["llama.block_count"] == config.num_hidden_layers
    assert fields["llama.attention.head_count"] == config.num_attention_heads
    assert fields["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert fields["llama.attention.key_length"] == fields["llama.attention.value_length"] == config.head_dim
    assert fields["llama.rope.dimension_count"] == config.head_dim
    assert fields["llama.rope.freq_base"] == config.rope_theta
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)


def test_a_gguf_holds_our_tokenizer(bundled, tmp_path):
    export_gguf(bundled, tmp_path / "b.gguf", "q8_0")
    fields = fields_of(gguf.GGUFReader(tmp_path / "b.gguf"))
    ours = sentencepiece.SentencePieceProcessor(model_file=str(bundled / "tokenizer.model"))
    n = ours.get_piece_size()
    assert fields["tokenizer.ggml.model"] == "t5"
    pieces = list(zip(*(fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")), strict=True))
    assert len(pieces) == n
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 5, TokenType.USER_DEFINED]
    for i, (text, score, kind) in enumerate(pieces):
        if not ours.is_byte(i):
            assert (text, score) == (ours.id_to_piece(i), ours.get_score(i))
            assert kind == (kinds[i] if i < len(kinds) else TokenType.NORMAL)
        elif kind == TokenType.BYTE:
            assert text == ours.id_to_piece(i)
        else:  # an ASCII character that no other piece is, which llama.cpp would not find among the bytes
            assert ours.id_to_piece(i) == f"<0x{ord(text):02X}>" and kind == TokenType.NORMAL
            assert score < min(ours.get_score(j) for j in range(n))
    special = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    assert special == {"bos": 1, "eos": 2, "unknown": 0, "padding": 3}
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    assert not fields["tokenizer.ggml.add_space_prefix"] and not fields["tokenizer.ggml.remove_extra_whitespaces"]


def test_an_untied_padded_bfloat16_model_goes_out_whole(folder, tmp_path):
    """As other people's models are; the padding of the embeddings gets names, which llama.cpp wants unique."""
    weights = {name: w.bfloat16() for name, w in load_file(folder / "model.safetensors").items()}
    embeddings = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embeddings, embeddings[:3]])
    weights["lm_head.weight"] = -weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    rewrite(folder, vocab_size=len(embeddings) + 3, tie_word_embeddings=False)
    export_gguf(folder, tmp_path / "b.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(tensors["output.weight"], weights["lm_head.weight"].float().numpy())
    assert len(tensors) == len(weights) - 1
    fields = fields_of(reader)
    assert fields["tokenizer.ggml.tokens"][-3:] == ["[PAD0]", "[PAD1]", "[PAD2]"]
    assert len(fields["tokenizer.ggml.scores"]) == len(fields["tokenizer.ggml.token_type"]) == len(embeddings) + 3
    assert fields["general.name"] == folder.name and "general.license" not in fields


def test_rows_that_are_no_whole_blocks_stay_float16(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights = {
        name: w[:, :40].contiguous() if "down" in name else w[:40] if re.search("gate|up", name) else w
        for name, w in weights.items()
    }
    save_file(weights, folder / "model.safetensors")
    rewrite(folder, intermediate_size=40)
    export_gguf(folder, tmp_path / "b.gguf", "q8_0")
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert types["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0


def spm(model_type: str, stories: list[str], **settings) -> bytes:
    """Another SentencePiece model of 320 pieces, as other people's storytellers have."""
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories),
        model_writer=written,
        model_type=model_type,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return written.getvalue()


def with_tokenizer(folder, serialized: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(serialized)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    n = Tokenizer(serialized).vocab_size
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = embeddings.repeat(2, 1)[:n].contiguous()
    save_file(weights, folder / "model.safetensors")
    rewrite(folder, vocab_size=n)


def test_a_bpe_tokenizer_keeps_its_rules(folder, tmp_path, stories):
    """Llama's own: BPE, a space put before the text."""
    with_tokenizer(folder, spm("bpe", stories))
    export_gguf(folder, tmp_path / "b.gguf")
    fields = fields_of(gguf.GGUFReader(tmp_path / "b.gguf"))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]
    export_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()  # ours would be a unigram's


def test_a_tokenizer_llama_cpp_does_not_have_is_refused(folder, tmp_path, stories):
    with_tokenizer(folder, spm("char", stories))
    with pytest.raises(ModelError, match="--format hf"):
        export_gguf(folder, tmp_path / "b.gguf")
    assert not [path for path in tmp_path.iterdir() if path.name != folder.name]


@pytest.mark.parametrize("broken", ["truncated", "shape", "missing", "extra", "pickle"])
@pytest.mark.parametrize("export", [export_gguf, export_hf])
def test_a_damaged_model_is_not_passed_on(folder, tmp_path, export, broken):
    path = folder / "model.safetensors"
    weights = load_file(path)
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif broken == "pickle":
        path.rename(folder / "pytorch_model.bin")
    else:
        if broken == "shape":
            weights["model.norm.weight"] = torch.ones(31)
        elif broken == "missing":
            del weights["model.layers.1.mlp.up_proj.weight"]
        else:
            weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(2)
        save_file(weights, path)
    with pytest.raises(ModelError, match=r"damaged|do not match|pickle"):
        export(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}


def test_a_gguf_overwrites_only_a_gguf(tiny_model, tmp_path):
    out = tmp_path / "a.gguf"
    out.write_text("my diary")
    with pytest.raises(InputError, match="no GGUF"):
        export_gguf(tiny_model, out)
    assert out.read_text() == "my diary"
    with pytest.raises(InputError, match="Name a file"):
        export_gguf(tiny_model, tmp_path)
    with pytest.raises(InputError, match="q8_0"):
        export_gguf(tiny_model, tmp_path / "b.gguf", "q4_0")
    export_gguf(tiny_model, tmp_path / "b.gguf", "f32")
    export_gguf(tiny_model, tmp_path / "b.gguf", "q8_0")
    assert fields_of(gguf.GGUFReader(tmp_path / "b.gguf"))["general.file_type"] == 7
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "b.gguf"}


def test_a_failed_write_leaves_the_old_file(tiny_model, tmp_path, monkeypatch):
    export_gguf(tiny_model, tmp_path / "a.gguf", "f32")
    old = (tmp_path / "a.gguf").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        export_gguf(tiny_model, tmp_path / "a.gguf", "q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == old and list(tmp_path.iterdir()) == [tmp_path / "a.gguf"]


def test_the_command_needs_no_torch(tiny_model, tmp_path):
    program = "import sys; from model.cli import main; main(standalone_mode=False); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, "export", "--model", tiny_model, "--out"]
    for form in ("gguf", "hf"):
        subprocess.run([*command, tmp_path / form, "--format", form], check=True, timeout=60)
    assert gguf.GGUFReader(tmp_path / "gguf").tensors and read_config(tmp_path / "hf")
    done = CliRunner().invoke(main, ["export", "--format", "hf", "--type", "f16", "--out", str(tmp_path / "x")])
    assert done.exit_code == 1 and "--type is for" in done.stderr and not (tmp_path / "x").exists()


# --- a Hugging Face folder ---


@pytest.mark.parametrize("which", ["bundled", "tiny_model"])
def test_transformers_goes_on_the_same_from_text(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    export_hf(folder, tmp_path / "out")
    decoder, tokenizer = load_decoder(folder), Tokenizer.load(folder)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    model.generation_config.eos_token_id = None  # neither stops at an end
    for prompt in PROMPTS:
        inputs = theirs(prompt, return_tensors="pt")
        ids = tokenizer.encode_opening(prompt)
        assert inputs.input_ids[0].tolist() == ids
        n_tokens = min(N_TOKENS, decoder.config.max_position_embeddings - len(ids))
        written = model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=n_tokens)[0]
        expected = greedy(decoder, ids, n_tokens)
        assert written.tolist() == expected
        if which == "bundled":  # random weights write bytes that are no text, which the two spell differently
            assert theirs.decode(written, skip_special_tokens=True) == tokenizer.decode(expected)


def test_weights_go_out_as_they_are_stored_and_the_card_with_them(bundled, tmp_path):
    export_hf(bundled, tmp_path / "out")
    for name in ("model.safetensors", "tokenizer.model", "README.md", "ATTRIBUTION.md", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bundled / name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_model_in_parts_opens_in_transformers(folder, tmp_path, n_parts):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in range(n_parts):
        names = sorted(weights)[part::n_parts]
        path = folder / f"model-0000{part + 1}-of-0000{n_parts}.safetensors"
        save_file({name: weights[name].float() for name in names}, path)
    export_hf(folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    tokens_bt = torch.tensor([Tokenizer.load(folder).encode_opening("Mia found")])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens_bt).logits, load_decoder(folder)(tokens_bt))


def test_only_a_model_folder_of_the_same_files_is_overwritten(tiny_model, bundled, folder, tmp_path):
    out = tmp_path / "out"
    export_hf(bundled, out)
    (out / "notes.txt").write_text("mine")
    export_hf(tiny_model, out)
    assert (out / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert (out / "notes.txt").read_text() == "mine"
    (out / "model-00001-of-00002.safetensors").write_text("of another model")
    with pytest.raises(InputError, match="model-00001"):
        export_hf(tiny_model, out)
    with pytest.raises(InputError, match="the model itself"):
        export_hf(folder, folder)
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("mine")
    with pytest.raises(InputError, match="no model folder"):
        export_hf(tiny_model, tmp_path / "diary")
    with pytest.raises(InputError, match="is a file"):
        export_hf(tiny_model, out / "notes.txt")


# --- llama.cpp, where it is installed ---


def open_in_llama_cpp(path):
    llama_cpp = pytest.importorskip("llama_cpp")
    float32 = llama_cpp.GGML_TYPE_F32  # its KV cache is float16 by default
    return llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=1, n_threads_batch=1, type_k=float32, type_v=float32, verbose=False
    )


@pytest.mark.parametrize("which", ["bundled", "tiny_model"])
def test_llama_cpp_goes_on_the_same(which, request, tmp_path):
    """From token ids; the tiny model's heads are grouped too, and its rows are no longer than one block."""
    folder = request.getfixturevalue(which)
    export_gguf(folder, tmp_path / "b.gguf", "f32")
    llama = open_in_llama_cpp(tmp_path / "b.gguf")
    decoder, tokenizer = load_decoder(folder), Tokenizer.load(folder)
    for prompt in PROMPTS:
        ids = tokenizer.encode_opening(prompt)
        n_tokens = min(N_TOKENS, decoder.config.max_position_embeddings - len(ids))
        written = islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), n_tokens)
        assert ids + list(written) == greedy(decoder, ids, n_tokens)


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.05)])
def test_llama_cpp_scores_smaller_files_nearly_the_same(bundled, tmp_path, kind, tolerance):
    """Mean distance of log-probabilities from ours, over all pieces after a story's opening."""
    export_gguf(bundled, tmp_path / "b.gguf", kind)
    llama = open_in_llama_cpp(tmp_path / "b.gguf")
    ids = Tokenizer.load(bundled).encode_opening(PROMPTS[0])
    llama.eval(ids)
    theirs = torch.from_numpy(np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), (llama.n_vocab(),)).copy())
    with torch.inference_mode():
        ours = load_decoder(bundled)(torch.tensor([ids]))[0, -1]
    assert (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().mean() < tolerance


def test_llama_cpp_splits_text_as_we_do(bundled, tmp_path, stories):
    """Its "llama" tokenizer merges pairs, and split nearly every story in another way than our unigram model.

    What it cannot do is spell characters beyond ASCII that the vocabulary lacks in bytes.
    """
    export_gguf(bundled, tmp_path / "b.gguf", "q8_0")
    llama, tokenizer = open_in_llama_cpp(tmp_path / "b.gguf"), Tokenizer.load(bundled)
    for text in [*PROMPTS[:3], *stories, "two  spaces ", "line\n\nline", string.printable]:
        ids = llama.tokenize(text.encode())
        assert ids == tokenizer.encode_opening(text)
        assert llama.detokenize(ids).decode() == text
    idea = llama.tokenize(b"<idea>a shy fox<story>", special=True)
    assert idea == tokenizer.encode_idea("a shy fox")
