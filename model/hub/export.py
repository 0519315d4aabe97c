"""A storyteller for other programs: one GGUF file for llama.cpp and its kin, or a folder for `transformers`.

The weights go out as they are stored, not as an engine here rounds them. Knows nothing of torch.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
from gguf import GGMLQuantizationType, LlamaFileType, TokenType

from model.checkpoint import load_tokenizer, read_config, read_weights, weight_files, write_folder
from model.config import ModelConfig
from model.errors import InputError, ModelError
from model.tokenizer import Tokenizer

GGUF_KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
UNIGRAM, BPE = 1, 2  # SentencePiece's TrainerSpec.ModelType
# The llama.cpp tokenizers that split text in the same way: the likeliest split, and merges of pairs.
GGUF_TOKENIZERS = {UNIGRAM: "t5", BPE: "llama"}
HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
CARD_FILES = ("*.md", "LICENSE*", "NOTICE*")  # many licences ask to go along with the weights


def export_gguf(folder: Path, out: Path, kind: str = "f16") -> None:
    """Write the model in `folder` to the GGUF file `out`, which appears complete or not at all.

    Args:
        kind: how matrices are stored: f32, f16, or q8_0 (8 bits, and a scale for every 32 weights). Gains are float32.

    Raises:
        InputError: no such kind; or `out` is a folder, or a file that is no GGUF.
        ModelError: the folder holds no model that can be written so.
    """
    folder, out = Path(folder), Path(out)
    if kind not in GGUF_KINDS:
        raise InputError(f"There is no GGUF type {kind!r}. Use one of {', '.join(GGUF_KINDS)}.")
    if out.is_dir():
        raise InputError(f"{out} is a folder. Name a file, such as {out / 'storyteller.gguf'}.")
    if out.exists() and not _is_gguf(out):
        raise InputError(f"{out} exists and is no GGUF file; choose another name.")
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    weights = read_weights(folder, config)

    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, "llama")
        _add_settings(writer, folder, config)
        _add_tokenizer(writer, tokenizer, config)
        _add_tensors(writer, config, weights, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    finally:
        Path(temporary).unlink(missing_ok=True)


def export_hf(folder: Path, out: Path) -> None:
    """Write the model in `folder` to the folder `out`, which opens in `transformers` as it is.

    A new folder appears complete or not at all; into an existing one the files go one by one, each whole, and others
    that are there stay.

    Raises:
        InputError: `out` is the model itself, or is there and holds something else that would not go together with it.
        ModelError: the folder holds no model that can be exported.
    """
    folder, out = Path(folder), Path(out)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    read_weights(folder, config)  # for its checks: what is damaged is not passed on
    parts = weight_files(folder)
    paths = [folder / name for name in HF_FILES] + [path for form in CARD_FILES for path in folder.glob(form)] + parts
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in paths if path.is_file()}
    if _sentencepiece(tokenizer).trainer_spec.model_type == UNIGRAM:
        # Without a tokenizer.json transformers takes a SentencePiece model for BPE, which splits text differently.
        files = {**tokenizer.hf_files(), **files}
    if [part.name for part in parts] != ["model.safetensors"]:
        weight_map = {name: part.name for part in parts for name in safetensors.safe_open(part, "np").offset_keys()}
        index = {"metadata": {"total_size": sum(len(files[part.name]) for part in parts)}, "weight_map": weight_map}
        files["model.safetensors.index.json"] = json.dumps(index, indent=1)
    _check_target(folder, out, set(files))
    write_folder(out, files)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _check_target(folder: Path, out: Path, names: set[str]) -> None:
    """Raise InputError when a model folder of these files cannot be written to `out`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file. Name a folder.")
    if out.samefile(folder):
        raise InputError(f"{out} is the model itself, a Hugging Face folder already; choose another name.")
    there = {path.name for path in out.iterdir()}
    if there and "config.json" not in there:
        raise InputError(f"{out} exists and is no model folder; choose another name.")
    # A reader would mix them with the files of this model.
    stale = {name for name in there if name in HF_FILES or re.fullmatch(r"model.*\.safetensors.*", name)} - names
    if stale:
        raise InputError(f"{out} holds a model of other files ({', '.join(sorted(stale))}); choose another name.")


def _sentencepiece(tokenizer: Tokenizer) -> Any:
    """The tokenizer's SentencePiece ModelProto."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.serialized)
    return proto


def _add_settings(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """What the file says of the model as a whole."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    title = re.search(r"^# +(.+?) *$", text, re.MULTILINE)
    licence = dict(re.findall(r"^(license\w*): *(\S.*?) *$", header[1] if header else "", re.MULTILINE))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title[1] if title else folder.resolve().name)
    writer.add_license(licence.get("license", ""))
    writer.add_license_name(licence.get("license_name", ""))
    writer.add_license_link(licence.get("license_link", ""))

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Pieces and rules; raises ModelError when llama.cpp has no tokenizer of this kind."""
    proto = _sentencepiece(tokenizer)
    kind = proto.trainer_spec.model_type
    if kind not in GGUF_TOKENIZERS:
        raise ModelError("The model's tokenizer is of a kind llama.cpp does not have. Use --format hf.")
    if kind == UNIGRAM:
        _bytes_to_characters(proto.pieces)
    n_padding = config.vocab_size - tokenizer.vocab_size
    padding = [f"[PAD{i}]" for i in range(n_padding)]
    writer.add_tokenizer_model(GGUF_TOKENIZERS[kind])
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece.encode() for piece in proto.pieces] + [name.encode() for name in padding])
    writer.add_token_scores([piece.score for piece in proto.pieces] + [0.0] * n_padding)
    # SentencePiece numbers its types of pieces as GGUF does.
    writer.add_token_types([piece.type for piece in proto.pieces] + [int(TokenType.UNUSED)] * n_padding)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)


def _bytes_to_characters(pieces: Any) -> None:
    """Give each ASCII byte piece the character it stands for as its text, where no other piece is that character.

    llama.cpp's "t5" does not spell in bytes what the vocabulary lacks: it would read such digits and signs as unknown
    (and beyond ASCII it does). The score is SentencePiece's for unknown characters, so text is split as before.
    """
    known = {piece.piece for piece in pieces}
    unknown_score = min(piece.score for piece in pieces if piece.type == TokenType.NORMAL) - 10
    for piece in pieces:
        character = chr(int(piece.piece[3:5], 16)) if piece.type == TokenType.BYTE else ""
        if "\0" < character < "\x80" and character != " " and character not in known:  # GGUF text ends at a \0
            piece.piece, piece.score, piece.type = character, unknown_score, TokenType.NORMAL


def _add_tensors(writer: gguf.GGUFWriter, config: ModelConfig, weights: dict[str, np.ndarray], kind: str) -> None:
    matrix_type, file_type = GGUF_KINDS[kind]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weight = _interleave(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = _interleave(weight, config.num_key_value_heads)
        stored = matrix_type if weight.ndim == 2 else GGMLQuantizationType.F32
        if stored == GGMLQuantizationType.Q8_0 and weight.shape[1] % 32:
            stored = GGMLQuantizationType.F16  # rows that are not made of whole blocks
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, gguf.quantize(weight, stored), raw_dtype=stored)


def _interleave(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection for llama.cpp.

    Here dimension i of a head turns with i + k/2 of its k; llama.cpp's "llama" turns neighbours, 2i with 2i + 1.
    """
    rows = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)
