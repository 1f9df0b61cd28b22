"""What a path is that is no checkpoint in Hugging Face format, and how it becomes one."""

from __future__ import annotations

from pathlib import Path

from cpt_merge.core.errors import UserError

_GGUF = (
    "`AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={file!r}).save_pretrained(OUT)`"
)
_POINTER = b"version https://git-lfs"
_FORMATS = (  # files in a folder, what it is, how it is converted; the first match counts
    ("vector.json", "a vector that extract-vector wrote, and no model", "give it with --vector"),
    ("train_state.json", "a training checkpoint", "run `cpt-merge export RECIPE`"),
    ("step-*/train_state.json", "a folder of training checkpoints",
     "run `cpt-merge export RECIPE`"),
    ("*/stage.json", "the folder of a run",
     "give one of its models: {path}/training/cpt, or {path}/merge/chat"),
    ("stage.json", "the folder of a run's stage", "give the model in it"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed",
     "run `python {path}/zero_to_fp32.py {path} OUT --safe_serialization`"),
    ("*zero_pp_rank_*_optim_states.pt", "the state of a DeepSpeed training",
     "run zero_to_fp32.py in the folder above it"),
    ("mp_rank_*_model_states.pt", "the state of a DeepSpeed training",
     "run zero_to_fp32.py in the folder above it"),
    (".metadata", "a distributed checkpoint of torch (DCP)",
     "run `accelerate merge-weights {path} OUT`"),
    ("*.distcp", "a part of a distributed checkpoint of torch (DCP) without its .metadata",
     "copy it again"),
    ("*/*.distcp", "a folder of distributed checkpoints of torch (DCP)",
     "run `accelerate merge-weights` on the one that holds the model"),
    ("mp_rank_*/model_optim_rng.pt", "a checkpoint of Megatron-LM",
     "convert it with Megatron-Bridge"),
    ("iter_*/mp_rank_*", "a folder of checkpoints of Megatron-LM",
     "convert one with Megatron-Bridge"),
    ("consolidated*.safetensors", "a model in Mistral's own format",
     "run transformers' convert_mistral_weights_to_hf.py"),
    ("consolidated*.pth", "a model in Meta's own format",
     "run transformers' convert_llama_weights_to_hf.py"),
    ("*.onnx", "a model in ONNX format", "get it in Hugging Face format"),
)  # fmt: skip


def describe_file(path: Path) -> str:
    """One sentence on a file that was given where a directory is needed."""
    if path.suffix == ".gguf":
        command = _GGUF.format(folder=str(path.parent), file=path.name)
        return f"{path} is a GGUF file; convert it with {command}."
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        if (path.parent / "config.json").is_file() and path.name.startswith(("model", "pytorch_")):
            return f"{path} is one file of a model; give its directory, {path.parent}."
        return (
            f"{path} is a single file of weights; put it into a directory as "
            f"model{path.suffix if path.suffix == '.safetensors' else '.safetensors'} with the "
            "config.json and the tokenizer of its model, and give that directory."
        )
    return f"{path} is a file; give the directory of a Hugging Face model."


def refuse_pointer(path: Path) -> None:
    """Raise `UserError` for the pointer that git leaves where it did not download a large file."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return
    if start == _POINTER:
        raise UserError(
            f"{path} is only a pointer of git LFS to the file itself; run `git lfs pull` in "
            f"{path.parent}, or download it again."
        )


def describe_folder(path: Path) -> str | None:
    """One sentence on a folder of another format; None if it is not recognised."""
    for pattern, what, how in _FORMATS:
        if any(path.glob(pattern)):
            return f"{path} is {what}; {how.format(path=path)}."
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        command = _GGUF.format(folder=str(path), file=gguf[0].name)
        return f"{path} contains its weights as GGUF ({gguf[0].name}); convert them with {command}."
    parts = sorted(path.glob("model-*-of-*.safetensors"))
    if parts:
        return (
            f"{path} contains {parts[0].name} without model.safetensors.index.json; copy or "
            "download it again."
        )
    single = sorted(path.glob("*.safetensors"))
    if single:
        return (
            f"{path} contains {single[0].name} but no model.safetensors; if it is the whole model, "
            f"run `mv {single[0]} {path / 'model.safetensors'}`."
        )
    return None
