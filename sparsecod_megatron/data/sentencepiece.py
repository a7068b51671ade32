"""A sentencepiece `.model` as a `tokenizers.Tokenizer` with the same ids.

transformers converts by model class (Llama's, T5's, …), each with its own rules for the leading space and byte
fallback; a bare file names no class. The model file states those rules itself, so they are read from there, and the
result is checked against sentencepiece on probes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sparsecod_megatron.errors import DataError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # SentencePiece.Type
_PROBES = (
    "The quick brown fox, aged 1234, didn't jump.",
    "  two leading spaces,  two inside, two trailing  ",
    "lines\n\nand\ttabs\r\n",
    "Größe, naïve, ﬁn, Ångström, ½, 日本語, Привет, עברית, 🎉",
    "def f(x):\n    return x**2 != {'a': [1, 2]}\n",
)


def convert_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Convert a sentencepiece BPE or unigram model.

    Args:
        path: the `.model` file.

    Returns:
        The tokenizer, and the special tokens it defines under transformers' names (`eos_token`, `unk_token`, …).

    Raises:
        DataError: of another type, or its ids are not those of the converted tokenizer.
        Exception: not a sentencepiece model, or damaged: whatever protobuf, sentencepiece or tokenizers raise.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

    processor = SentencePieceProcessor(model_file=str(path))
    proto = ModelProto.FromString(path.read_bytes())
    tokenizer = Tokenizer(_model(proto, path))
    tokenizer.normalizer = _normalizer(proto)
    tokenizer.pre_tokenizer = _pre_tokenizer(proto)
    tokenizer.decoder = _decoder(proto)
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)])
    for probe in _PROBES:
        if tokenizer.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            message = f"converted to a HuggingFace tokenizer it would encode {probe!r} differently"
            raise DataError(f"{path}: {message}; give a tokenizer.json or a HuggingFace directory instead")
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    ids["unk_token"] = processor.unk_id()
    return tokenizer, {name: processor.id_to_piece(index) for name, index in ids.items() if index >= 0}


def _model(proto: Any, path: Path) -> models.Model:
    byte_fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scores, proto.trainer_spec.unk_id, byte_fallback)
    if proto.trainer_spec.model_type == _BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        unknown = proto.trainer_spec.unk_piece
        return models.BPE(vocabulary, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    kind = proto.trainer_spec.model_type
    raise DataError(f"{path}: sentencepiece model of type {kind}; give a BPE (2) or unigram (1) model")


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: what sentencepiece's BPE looks up as it goes."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((score, left, right))
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]


def _normalizer(proto: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _pre_tokenizer(proto: Any) -> pre_tokenizers.PreTokenizer:
    """Put a space before the text as a whole.

    `Metaspace` would leave it out before a text that begins with a space already. All real spaces are `▁` by now, so a
    first `Metaspace` with a plain space as its mark always adds one, and a second turns that one into `▁`.
    """
    first = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=first, split=False),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
        ]
    )


def _decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
