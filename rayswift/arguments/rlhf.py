"""The settings of `rayswift rlhf`: preference methods, reward models, PPO, GRPO, distillation."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.engines import VllmArguments
from rayswift.arguments.fields import arg

RLHF_TYPES = ("dpo", "orpo", "simpo", "kto", "cpo", "rm", "ppo", "grpo", "gkd")
_SAMPLING_TYPES = ("ppo", "grpo", "gkd")
#: Losses of TRL's DPOTrainer; see its documentation for each one's paper.
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
#: Rules of flags for the methods that sample answers.
_SAMPLED = {f"rlhf_type!={'|'.join(_SAMPLING_TYPES)}": f"only with --rlhf_type {' or '.join(_SAMPLING_TYPES)}"}
#: What SWIFT logs of a preference run, by TRL's names; each a mean over pairs.
PREFERENCE_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip
_DEFAULT_BETA = {"simpo": 2.0, "grpo": 0.04, "gkd": 0.5}


def _only(rlhf_types: str) -> dict[str, str]:
    """The rule of a flag for some methods."""
    names = rlhf_types.split()
    return {f"rlhf_type!={'|'.join(names)}": f"only with --rlhf_type {' or '.join(names)}"}


@dataclass(init=False, repr=False, eq=False)
class PreferenceArguments(Arguments):
    """DPO, ORPO, SimPO, CPO, KTO and reward models."""

    topic: ClassVar[str] = "Preference learning"

    rlhf_type: str = arg("dpo", "method", choices=RLHF_TYPES)
    beta: float | None = arg(
        None, "distance kept to the reference model", ge=0, shown="0.1; simpo 2, grpo 0.04, gkd 0.5"
    )
    loss_type: list[str] = arg([], "loss (several: a weighted sum)", shown="the method's", topic="Preference learning")
    loss_weights: list[float] | None = arg(None, "weights of several --loss_type")
    label_smoothing: float = arg(
        0.0, "share of wrongly labelled pairs to expect", ge=0, le=0.5,
        no_effect={"loss_type!=exo_pair|robust|aot|aot_unpaired": "only with --loss_type exo_pair, robust or aot"},
    )  # fmt: skip
    rpo_alpha: float | None = arg(
        None, "DPO: weight of the likelihood of the chosen answer", ge=0, no_effect=_only("dpo")
    )
    ld_alpha: float | None = arg(
        None, "DPO: weight of the tokens beyond the common length", ge=0, le=1, no_effect=_only("dpo")
    )
    discopop_tau: float = arg(
        0.05, "DPO: temperature of the discopop loss", gt=0,
        no_effect={"loss_type!=discopop": "only with --loss_type discopop"},
    )  # fmt: skip
    simpo_gamma: float = arg(1.0, "SimPO: target margin", ge=0, no_effect=_only("simpo"))
    cpo_alpha: float = arg(
        1.0, "CPO: weight of the likelihood of the chosen answer", ge=0, no_effect=_only("cpo simpo")
    )
    desirable_weight: float = arg(1.0, "KTO: weight of good answers", ge=0, no_effect=_only("kto"))
    undesirable_weight: float = arg(1.0, "KTO: weight of bad answers", ge=0, no_effect=_only("kto"))
    center_rewards_coefficient: float | None = arg(
        None, "RM: pull rewards towards a mean of zero", ge=0, no_effect=_only("rm")
    )
    ref_model: str | None = arg(None, "reference model", shown="the model before training")
    ref_model_type: str | None = arg(
        None, "family of the reference model", shown="found from its config", no_effect="its config.json says it"
    )
    ref_model_revision: str | None = arg(
        None, "branch, tag or commit of the reference model", no_effect={"ref_model=none": "only with --ref_model"}
    )
    ref_adapters: list[str] = arg(
        [], "adapters of the reference model", no_effect="training starts from its reference, --adapters"
    )

    def problems(self) -> Iterator[str]:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            weights, losses = len(self.loss_weights), len(self.loss_type)
            yield f"--loss_weights has {weights} values but --loss_type has {losses}: give one weight per loss"
        if self.ref_model and self.rlhf_type in ("orpo", "simpo", "cpo", "rm"):
            yield f"--ref_model contradicts --rlhf_type {self.rlhf_type}, which has none: drop --ref_model"

    def resolve(self) -> None:
        if not self.is_set("beta"):
            self.beta = _DEFAULT_BETA.get(self.rlhf_type, 0.1)


@dataclass(init=False, repr=False, eq=False)
class RewardArguments(Arguments):
    """What answers are rewarded for."""

    topic: ClassVar[str] = "Rewards and teachers"
    no_effect: ClassVar[dict[str, str]] = _SAMPLED

    reward_funcs: list[str] = arg(
        [], "GRPO: reward functions: accuracy, format, cosine, repetition, soft_overlong, ..."
    )
    reward_weights: list[float] | None = arg(None, "GRPO: weights of the rewards", shown="1 each")
    reward_model: list[str] = arg([], "PPO, GRPO: reward models")
    reward_adapters: list[str] = arg([], "PPO, GRPO: adapters of the reward models")
    reward_model_type: list[str] = arg([], "families of the reward models", shown="found from their configs")
    reward_model_revision: list[str] = arg([], "branches, tags or commits of the reward models")
    reward_template: list[str] = arg([], "templates of the reward models", shown="found from the models")
    reward_model_plugin: list[str] = arg([], "how a reward model is asked", shown="default")
    cosine_min_len_value_wrong: float = arg(-0.5, "cosine: reward of the shortest wrong answer")
    cosine_max_len_value_wrong: float = arg(0.0, "cosine: reward of the longest wrong answer")
    cosine_min_len_value_correct: float = arg(1.0, "cosine: reward of the shortest right answer")
    cosine_max_len_value_correct: float = arg(0.5, "cosine: reward of the longest right answer")
    cosine_max_len: int | None = arg(
        None, "cosine: length that counts as longest", ge=1, shown="--max_completion_length"
    )
    repetition_n_grams: int = arg(3, "repetition: words per n-gram", ge=1)
    repetition_max_penalty: float = arg(-1.0, "repetition: reward of pure repetition", le=0)
    soft_max_length: int | None = arg(None, "soft_overlong: longest answer", ge=1)
    soft_cache_length: int | None = arg(None, "soft_overlong: tokens before it in which the reward falls", ge=1)
    teacher_model: str | None = arg(None, "GKD: teacher model")
    teacher_adapters: list[str] = arg([], "GKD: adapters of the teacher")
    teacher_model_type: str | None = arg(None, "GKD: family of the teacher", shown="found from its config")
    teacher_model_revision: str | None = arg(None, "GKD: branch, tag or commit of the teacher")
    lmbda: float = arg(0.5, "GKD: share of answers from the student", ge=0, le=1)
    sft_alpha: float = arg(0.0, "GKD: weight of the likelihood of the dataset's answer", ge=0)
    gkd_logits_topk: int | None = arg(None, "GKD: compare only the teacher's likeliest tokens", ge=1, shown="all")

    def problems(self) -> Iterator[str]:
        sources = len(self.reward_funcs) + len(self.reward_model)
        if self.reward_weights is not None and len(self.reward_weights) != sources:
            yield (f"--reward_weights has {len(self.reward_weights)} values but --reward_funcs and --reward_model "
                   f"name {sources}: give one weight each")  # fmt: skip


@dataclass(init=False, repr=False, eq=False)
class RolloutArguments(VllmArguments):
    """How PPO, GRPO and GKD sample answers and learn from them."""

    topic: ClassVar[str] = "Roll-out"
    no_effect: ClassVar[dict[str, str]] = _SAMPLED

    max_completion_length: int = arg(
        512, "longest sampled answer, in tokens", ge=1, aliases=("response_length", "max_new_tokens")
    )
    temperature: float = arg(0.9, "sampling temperature", gt=0)
    top_k: int = arg(-1, "sample among the k likeliest tokens (-1: all)", ge=-1)
    top_p: float = arg(1.0, "sample among the likeliest tokens of this joint probability", gt=0, le=1)
    min_p: float = arg(0.0, "least probability of a token, relative to the likeliest", ge=0, le=1)
    repetition_penalty: float = arg(1.0, "above 1, repeated tokens get less likely", gt=0)
    stop_words: list[str] = arg([], "texts that end an answer")
    use_vllm: bool = arg(False, "sample with vLLM")
    vllm_mode: str = arg("colocate", "vLLM beside the training workers, or as a server", choices=("colocate", "server"))
    vllm_server_host: list[str] = arg([], "hosts of running vLLM servers", shown="started by this run")
    vllm_server_port: list[int] = arg([8000], "their ports", ge=1, le=65535)
    vllm_server_base_url: list[str] = arg([], "their addresses, instead of hosts and ports")
    vllm_server_timeout: float = arg(240.0, "seconds to wait for them", gt=0)
    async_generate: bool = arg(False, "sample the next batch while training on this one")
    sleep_level: int = arg(0, "colocate: what vLLM gives back while training", ge=0, le=2)
    offload_model: bool = arg(False, "colocate: move the training weights away while sampling")
    offload_optimizer: bool = arg(False, "colocate: move the optimiser state away while sampling")
    num_generations: int = arg(8, "GRPO: answers per prompt; 1 only with --teacher_model", ge=1)
    epsilon: float = arg(0.2, "GRPO: clipping of the ratio", ge=0)
    epsilon_high: float | None = arg(None, "GRPO: clipping of the ratio, upwards", ge=0, shown="--epsilon")
    delta: float | None = arg(None, "GRPO: upper bound of the ratio for negative advantages", gt=0)
    num_iterations: int = arg(1, "GRPO: passes over each sampled batch", ge=1)
    steps_per_generation: int | None = arg(
        None, "GRPO: steps per sampled batch", ge=1, shown="--gradient_accumulation_steps"
    )
    scale_rewards: str = arg(
        "group", "GRPO: what rewards are divided by", choices=("group", "batch", "none"), swift_only=("gdpo",)
    )
    advantage_estimator: str = arg(
        "grpo", "how advantages are estimated", choices=("grpo", "rloo", "reinforce_plus_plus")
    )
    importance_sampling_level: str = arg(
        "token", "GRPO: ratio per token or per sequence", choices=("token", "sequence"), swift_only=("sequence_token",)
    )
    kl_in_reward: bool | None = arg(
        None, "take the distance to the reference model off the reward, not into the loss",
        shown="true with --advantage_estimator rloo or reinforce_plus_plus",
    )  # fmt: skip
    fipo_decay_rate: float = arg(32.0, "loss fipo: how far the ratios of later tokens count", gt=0)
    fipo_clip_range: float = arg(0.2, "loss fipo: clipping of that influence", ge=0)
    fipo_clip_high_only: bool = arg(True, "loss fipo: never below 1")
    fipo_safety_threshold: float = arg(
        4.0, "loss fipo: above this ratio a bad answer's token counts no more for it", ge=0
    )
    dynamic_sample: bool = arg(False, "GRPO: sample again where all answers got the same reward")
    max_resample_times: int = arg(3, "GRPO: how often", ge=1)
    overlong_filter: bool = arg(False, "GRPO: leave cut-off answers out of the loss")
    sync_ref_model: bool = arg(False, "GRPO: move the reference model along")
    ref_model_sync_steps: int = arg(512, "GRPO: steps between such moves", ge=1)
    ref_model_mixup_alpha: float = arg(0.6, "GRPO: how far it moves", ge=0, le=1)
    top_entropy_quantile: float = arg(1.0, "GRPO: share of tokens with the highest entropy to train", gt=0, le=1)
    log_completions: bool = arg(False, "write the sampled answers to completions.jsonl")
    log_entropy: bool = arg(False, "log the entropy")
    max_turns: int | None = arg(None, "most turns of a conversation", ge=1)
    multi_turn_scheduler: str | None = arg(None, "plugin that continues conversations")
    num_ppo_epochs: int = arg(4, "PPO: passes over each sampled batch", ge=1)
    num_mini_batches: int = arg(1, "PPO: parts of each sampled batch", ge=1)
    kl_coef: float = arg(0.05, "PPO: weight of the distance to the reference model", ge=0)
    cliprange: float = arg(0.2, "PPO: clipping of the ratio", ge=0)
    cliprange_value: float = arg(0.2, "PPO: clipping of the value", ge=0)
    vf_coef: float = arg(0.1, "PPO: weight of the value loss", ge=0)
    gamma: float = arg(1.0, "PPO: discount", ge=0, le=1)
    lam: float = arg(0.95, "PPO: lambda of the advantage estimate", ge=0, le=1)
    whiten_rewards: bool = arg(False, "PPO: normalise the rewards")
    missing_eos_penalty: float | None = arg(None, "PPO: taken from the reward of a cut-off answer", ge=0)
    local_rollout_forward_batch_size: int = arg(64, "PPO: rows per forward pass while sampling", ge=1)


@dataclass(init=False, repr=False, eq=False)
class RlhfRules(PreferenceArguments, RewardArguments, RolloutArguments):
    """What the methods need as a whole."""

    def problems(self) -> Iterator[str]:
        if self.rlhf_type == "ppo" and not self.reward_model:
            yield "--rlhf_type ppo needs --reward_model"
        if self.rlhf_type == "grpo" and self.num_generations < 2 and not self.teacher_model:
            yield ("--num_generations 1: GRPO compares the answers to a prompt; give at least 2, or --teacher_model, "
                   "whose distance needs no comparison")  # fmt: skip
        if self.rlhf_type == "grpo" and not (self.reward_funcs or self.reward_model or self.teacher_model):
            yield "--rlhf_type grpo needs --reward_funcs or --reward_model, for example --reward_funcs accuracy format"
        if self.rlhf_type == "gkd" and not self.teacher_model:
            yield "--rlhf_type gkd needs --teacher_model"
        if self.use_vllm and self.rlhf_type not in _SAMPLING_TYPES:
            yield f"--use_vllm true contradicts --rlhf_type {self.rlhf_type}, which samples nothing: drop --use_vllm"
        for flag in ("offload_model", "offload_optimizer"):
            if getattr(self, flag) and not (self.use_vllm and self.vllm_mode == "colocate"):
                yield f"--{flag} true needs --use_vllm true --vllm_mode colocate"
