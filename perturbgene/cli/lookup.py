"""Names of settings: which flag a name means to a verb, and what to say of one that it does not know.

Owns the flags that every verb has beside its own and the names that transformers 5 has dropped; leaves values to
`values`.
"""

import difflib

from perturbgene.cli.base import BaseConfig
from perturbgene.cli.flags import GROUPS, Flag, members, own_flags, training_flags
from perturbgene.cli.training import TrainingConfig
from perturbgene.cli.verbs import CONFIGS
from perturbgene.errors import InputError

CONFIG_FLAG = Flag("config", str, None, "YAML file with settings by flag name; flags win over it.", GROUPS[0])
HELP_FLAG = Flag("help", bool, None, "Show this page and leave (also -h).", GROUPS[0], bare=True)
DEBUG_FLAG = Flag("debug", bool, None, "Show the traceback of an error.", GROUPS[0], bare=True)
HELP_ALL_FLAG = Flag("help-all", bool, None, "Show also every field of TrainingArguments.", GROUPS[0], bare=True)
GONE_IN_V5 = {
    "evaluation_strategy": "It is called --eval_strategy now.",
    "warmup_ratio": "Give the ratio to --warmup_steps: a number below 1 is a share of all steps.",
    "overwrite_output_dir": "Choose another --output_dir, or continue with --resume_from_checkpoint.",
    "logging_dir": "TensorBoard logs lie in a folder `runs` within --output_dir.",
    "save_safetensors": "Weights are always written as safetensors; leave it out.",
    "no_cuda": "It is called --use_cpu now.",
    "use_mps_device": "Apple GPUs are used when present; --use_cpu avoids them.",
    "use_ipex": "Leave it out; --bf16 is what makes CPU training fast.",
    "per_gpu_train_batch_size": "It is called --per_device_train_batch_size now.",
    "per_gpu_eval_batch_size": "It is called --per_device_eval_batch_size now.",
    "group_by_length": "It is called --train_sampling_strategy group_by_length now.",
    "include_inputs_for_metrics": "It is called --include_for_metrics inputs now.",
    "fp16_backend": "Leave it out; --fp16 or --bf16 is enough.",
    "half_precision_backend": "Leave it out; --fp16 or --bf16 is enough.",
    "push_to_hub_token": "It is called --hub_token now.",
    "push_to_hub_model_id": "It is called --hub_model_id now.",
    "dispatch_batches": "Each rank reads its own rows; leave it out.",
    "split_batches": "Each rank reads its own rows; leave it out.",
    "torchdynamo": "It is called --torch_compile_backend now.",
}


def find_flag(name: str, config_class: type[BaseConfig], *, where: str) -> Flag:
    """Look a flag up among a verb's own and, for training, among those of TrainingArguments.

    Raises:
        InputError: It is of another verb, gone, or unknown; says what comes nearest.
    """
    own = {flag.spelling: flag for flag in own_flags(config_class).values()}
    known = {CONFIG_FLAG.name: CONFIG_FLAG, **own_flags(config_class), **own}
    if name in known:
        return known[name]
    if issubclass(config_class, TrainingConfig):
        if name in GONE_IN_V5:
            raise InputError(f"{where} is gone from transformers 5. {GONE_IN_V5[name]}")
        known |= training_flags()
        if name in known:
            return known[name]
    verbs = [verb for verb, other in CONFIGS.items() if name in own_flags(other)]
    if verbs:
        raise InputError(
            f"{where} is a setting of {' and '.join(verbs)}, not of {config_class.verb}. "
            f"Remove it, or see `perturbgene {config_class.verb} -h`."
        )
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {nearest[0]!r}?" if nearest else f"See `perturbgene {config_class.verb} -h` for all."
    raise InputError(f"{where} is unknown to {config_class.verb}. {hint}")


def find_negatable(name: str, config_class: type[BaseConfig], *, where: str) -> tuple[Flag, bool]:
    """Look a flag up, also as ``no_NAME``; returns it and whether it was negated."""
    stem = name.removeprefix("no_")
    if stem != name and name not in GONE_IN_V5:
        known = own_flags(config_class)
        known = training_flags() if stem not in known and issubclass(config_class, TrainingConfig) else known
        if stem in known and bool in members(known[stem].kind):
            return known[stem], True
    return find_flag(name, config_class, where=where), False
