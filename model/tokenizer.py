"""SentencePiece unigram tokenizer: train, encode, decode exactly, decode while streaming. Knows nothing of torch.

Any UTF-8 text survives encode and decode. Text is only ever text: the special tokens (<s>, <idea>, ...) cannot come
out of `encode`; the code that asks for a story puts them in by id.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from model.errors import InputError, ModelError

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
SPECIAL_TOKENS = ("<pad>", "<idea>", "<story>")


class Tokenizer:
    """Text to token ids and back, from a serialised SentencePiece model.

    Raises:
        ModelError: the bytes are no SentencePiece model, or it lacks begin, end or byte pieces.
    """

    def __init__(self, serialized: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except RuntimeError as error:
            raise ModelError("tokenizer.model is damaged or no SentencePiece model. Download it again.") from error
        self.serialized = serialized
        processor = self._processor
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ModelError("The tokenizer has no begin or end token, so it cannot tell where a story ends.")
        pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        self._piece_bytes = [self._bytes_of(i, piece) for i, piece in enumerate(pieces)]
        byte_ids = [i for i in range(len(pieces)) if processor.IsByte(i)]
        if len(byte_ids) != 256:
            raise ModelError("The tokenizer has no byte fallback, so it cannot spell every text.")
        self._space_mark_ids = [byte_ids[byte] for byte in SPACE_MARK.encode()]
        special = {piece: i for i, piece in enumerate(pieces) if processor.is_control(i)}
        self.pad_id = special.get("<pad>", self.eos_id)
        self.idea_id, self.story_id = special.get("<idea>"), special.get("<story>")

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if self._processor.IsByte(token):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return piece.replace(SPACE_MARK, " ").encode()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.model` from a model folder; raises ModelError when it is missing or damaged."""
        path = Path(folder) / "tokenizer.model"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.model. A storyteller folder needs one (SentencePiece).")
        return cls(path.read_bytes())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a unigram model (Kudo 2018) of `vocab_size` pieces, or fewer when the text has no more.

        Raises:
            InputError: there is no text to learn from.
        """
        paragraphs = (line for text in texts for line in text.split("\n") if line.strip())
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=paragraphs,
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=0.9999,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                max_sentence_length=20_000,
                input_sentence_size=400_000,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                control_symbols=list(SPECIAL_TOKENS),
                user_defined_symbols=["\n"],
                num_threads=2,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise InputError(f"No tokenizer of {vocab_size} pieces could be made from this text: {error}") from error
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        return len(self._piece_bytes)

    @property
    def knows_ideas(self) -> bool:
        """Whether the storyteller was trained to turn an idea into a story."""
        return self.idea_id is not None and self.story_id is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone; raises InputError when it is no valid Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("The text holds a broken character (half of a pair). Remove it and try again.") from error
        ids: list[int] = []
        # SentencePiece would read a literal U+2581 as a space, so it is spelled in bytes.
        for i, part in enumerate(text.split(SPACE_MARK)):
            if i:
                ids += self._space_mark_ids
            ids += self._processor.encode(part)
        return ids

    def encode_idea(self, idea: str) -> list[int]:
        """Ids that ask for a story from an idea: begin, <idea>, the idea, <story>."""
        assert self.idea_id is not None and self.story_id is not None
        return [self.bos_id, self.idea_id, *self.encode(idea), self.story_id]

    def encode_opening(self, opening: str) -> list[int]:
        """Ids that ask for a continuation: begin, the opening."""
        return [self.bos_id, *self.encode(opening)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes the tokens stand for; special tokens stand for none."""
        return b"".join(self._piece_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    def hf_files(self) -> dict[str, str]:
        """`tokenizer.json` and `tokenizer_config.json`, with which `transformers` splits text exactly as we do."""
        processor = self._processor
        pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(self.vocab_size)]
        added = [
            {
                "id": i,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": processor.is_control(i) or processor.is_unknown(i),
            }
            for i, (piece, _) in enumerate(pieces)
            if processor.is_control(i) or processor.is_unknown(i) or piece == "\n"
        ]
        bos, eos = processor.id_to_piece(self.bos_id), processor.id_to_piece(self.eos_id)
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": SPACE_MARK,
                "prepend_scheme": "never",
                "split": False,
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    {"SpecialToken": {"id": bos, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {"type": "Unigram", "unk_id": processor.unk_id(), "vocab": pieces, "byte_fallback": True},
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "pad_token": processor.id_to_piece(self.pad_id),
            "clean_up_tokenization_spaces": False,
        }
        return {
            "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1),
            "tokenizer_config.json": json.dumps(settings, indent=2),
        }


class StreamDecoder:
    """Turns tokens into text as they come, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What was held back, with U+FFFD for a character that never ended."""
        return self._utf8.decode(b"", final=True)
