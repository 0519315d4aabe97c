"""Model folders in Hugging Face form: config.json, model.safetensors, tokenizer files. Atomic save, strict load.

Only safetensors are ever read: a pickle can run code when opened, so a folder that has nothing else is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors

from model.config import ModelConfig, SamplingParams
from model.errors import InputError, ModelError
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from model.decoder import Decoder

MAX_PADDING = 256
NUMPY_TYPES: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}
TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")  # what tempfile makes of the prefixes here
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a half."""
    content = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_folder(folder: Path, files: dict[str, bytes | str]) -> None:
    """Write files into a folder: a new one appears complete or not at all; into one that is there the files go one by
    one, each whole, and others that are there (a model card, say) stay."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, content in files.items():
            write_atomically(temporary / name, content)
        os.chmod(temporary, 0o755)
        if folder.exists():
            for name in files:
                os.replace(temporary / name, folder / name)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, of: Callable[[str], bool] = lambda name: True) -> None:
    """Delete the temporary files and folders that killed writes have left in a folder: of the names that nobody may be
    writing just now (`of`)."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if (made := TEMPORARY.fullmatch(path.name)) and of(made[1]):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def read_config(folder: Path) -> ModelConfig:
    """Read and check `config.json`; raises ModelError with what to do when that fails."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json, so it is no model folder. Check the path.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}). Download the model again.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} does not hold the settings of a model. Download the model again.")
    return ModelConfig.from_hf(fields)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files.

    Raises:
        ModelError: there are none, or only pickles, which Taleloom does not open.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in Path(folder).glob("*") if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when opened. "
            "Taleloom opens safetensors only: convert the model first."
        )
    raise ModelError(f"{folder} has no model.safetensors. The weights are missing: download the model again.")


def read_weights(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The weights by name, float32; lm_head.weight only where it is not the embeddings.

    Raises:
        ModelError: files missing or damaged, weights that are no numbers or do not match config.json.
    """
    weights = {}
    for file in weight_files(folder):
        try:
            tensors = safetensors.deserialize(file.read_bytes())
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or incomplete ({error}). Download it again.") from error
        for name, tensor in tensors:
            if (stored := tensor["dtype"]) not in NUMPY_TYPES:
                raise ModelError(f"{file} holds {name} as {stored}. Taleloom reads {', '.join(NUMPY_TYPES)}.")
            weight = np.frombuffer(tensor["data"], NUMPY_TYPES[stored]).reshape(tensor["shape"])
            if stored == "BF16":  # the upper half of a float32, which numpy has no type for
                weight = (weight.astype(np.uint32) << 16).view(np.float32)
            weights[name] = weight.astype(np.float32)
            if not np.isfinite(weights[name]).all():
                raise ModelError(f"{file} holds infinite numbers or none at all in {name}. Download the model again.")
    # Some exporters store the rotary frequencies, which follow from the config, and a tied head twice.
    weights = {name: weight for name, weight in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)

    expected = weight_shapes(config)
    found = {name: weight.shape for name, weight in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise ModelError(
            f"The weights in {folder} do not match its config.json: {name} should be {expected.get(name, 'absent')} "
            f"and is {found.get(name, 'missing')}. Download the model again."
        )
    return weights


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What each weight's shape is by config.json."""
    d, f, k = config.hidden_size, config.intermediate_size, config.head_dim
    n_q, n_kv = config.num_attention_heads * k, config.num_key_value_heads * k
    layer: dict[str, tuple[int, ...]] = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    layer |= {"self_attn.q_proj": (n_q, d), "self_attn.k_proj": (n_kv, d), "self_attn.v_proj": (n_kv, d)}
    layer |= {"self_attn.o_proj": (d, n_q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    embeddings = (config.vocab_size, d)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embeddings, "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = embeddings
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """Read the folder's tokenizer; raises ModelError when it is not the one the model was trained with."""
    tokenizer = Tokenizer.load(folder)
    # Models may be padded to a round number of pieces; by more it is another model's tokenizer.
    if not config.vocab_size - MAX_PADDING <= tokenizer.vocab_size <= config.vocab_size:
        raise ModelError(
            f"The tokenizer has {tokenizer.vocab_size} pieces and the model {config.vocab_size}: they do not belong "
            "together. Use the tokenizer.model that came with the weights."
        )
    return tokenizer


def load_decoder(folder: Path, device: str = "cpu") -> Decoder:
    """Build the decoder with float32 weights, in evaluation mode.

    Raises:
        ModelError: files missing or damaged, or weights that do not match config.json.
    """
    import torch

    from model.decoder import Decoder

    config = read_config(folder)
    weights = read_weights(folder, config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    decoder = Decoder(config)
    decoder.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return decoder.eval().to(device)


def save_model(folder: Path, decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Write a whole model folder, float16 weights. A new folder appears complete or not at all; into an existing one
    the files go one by one, each whole, and others that are there (a model card, say) stay.

    Raises:
        InputError: the folder is there and holds something that is no model.
    """
    import safetensors.torch
    import torch

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise InputError(f"{folder} exists and is no model folder; choose another name.")
    state = {name: w.detach().to("cpu", torch.float16).contiguous() for name, w in decoder.state_dict().items()}
    if decoder.config.tie_word_embeddings:
        del state["lm_head.weight"]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    sampling = dataclasses.asdict(SamplingParams())
    sampling = {"max_new_tokens": sampling.pop("max_tokens"), **{k: v for k, v in sampling.items() if k != "seed"}}
    files: dict[str, bytes | str] = {
        "config.json": json.dumps({**decoder.config.to_hf(), **ids}, indent=2),
        "generation_config.json": json.dumps({**ids, "do_sample": True, **sampling}, indent=2),
        "tokenizer.model": tokenizer.serialized,
        **tokenizer.hf_files(),
        "model.safetensors": safetensors.torch.save(state, metadata={"format": "pt"}),
    }
    write_folder(folder, files)
