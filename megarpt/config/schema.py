"""The configuration of a run, as data: typed, frozen, free of torch.

Names are megatron-core's wherever it has one. The doc string under a field is what `megarpt show-config --help-fields` prints.
megatron-core's own knobs are not declared again: they pass through the `mcore` blocks, whose keys are checked against its
dataclasses before anything is allocated.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _bare_prefix(value: object) -> object:
    """A held-out corpus without sidecars is written as its prefix alone."""
    if not isinstance(value, str | dict | BaseModel):
        raise ValueError("expected a prefix, or a section with the keys path and streams")
    return {"path": value} if isinstance(value, str) else value


def _whole(value: object) -> object:
    """Token counts are written as 3e8 by people; anything else that is not an integer stays an error."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
NonNegative = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]
Device = Literal["auto", "cpu", "cuda"]
Stream = Literal["ref_nll", "ref_entropy"]

DEFAULT_CHUNK_TOKENS, DEFAULT_HEAD_KEEP_MIB = 2048, 128  # what null stands for where no memory budget is given


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, nothing is coerced, instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class RunConfig(Section):
    """Where a run writes and what makes it repeatable."""

    dir: Text
    """The run folder: metrics, TensorBoard files, checkpoints, the resolved configuration, exit.json."""
    seed: NonNegative = 1234
    """Seeds weight initialization, dropout, data order and random scorers."""
    device: Device = "auto"
    """`auto` takes CUDA when it is usable."""


class GptConfig(Section):
    """Arguments of megatron-core's GPTModel, over the preset's; null takes the preset's."""

    max_sequence_length: Positive | None = None
    """Longest sample the model may be given."""
    share_embeddings_and_output_weights: bool | None = None
    """One matrix for the embedding and the output layer."""
    rotary_base: Annotated[float, Field(gt=1.0)] | None = None
    """Base of the rotary angles."""
    rope_scaling_factor: Annotated[float, Field(gt=1.0)] | None = None
    """Llama 3's scaling of long wavelengths, for a model that was first trained on 8192 positions."""
    seq_len_interpolation_factor: Annotated[float, Field(gt=1.0)] | None = None
    """Divides all positions (linear scaling)."""


class ModelConfig(Section):
    """Which network."""

    preset: Text = "tiny"
    """A name from megarpt/config/presets.py."""
    vocab_size: Positive | None = None
    """Rows of the embedding; null takes the tokenizer's size. Must not be smaller than the tokenizer's size."""
    make_vocab_size_divisible_by: Positive = 128
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size; padded entries carry no probability."""
    init_from: Text | None = None
    """Run folder or checkpoint whose weights start this run (weights only; step, optimizer and data start afresh)."""
    gpt: GptConfig = Field(default_factory=GptConfig)
    """Arguments of megatron-core's GPTModel, over the preset's."""
    mcore: dict[str, Any] = Field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig, over the preset's."""


class CorpusSource(Section):
    """One tokenized corpus in a blend."""

    path: Text
    """Prefix of the `.bin`, `.idx` and `.json` files."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Relative share of samples in the blend."""
    streams: dict[str, Text] = Field(default_factory=dict)
    """Per-token sidecars: stream name -> prefix, for example `ref_nll: data/mix_ref_nll`."""


class HeldOutCorpus(Section):
    """One held-out corpus."""

    path: Text
    """Prefix of the `.bin`, `.idx` and `.json` files."""
    streams: dict[str, Text] = Field(default_factory=dict)
    """Per-token sidecars, as in data.train; with them held-out loss is split into kept-like and dropped-like tokens."""


class TextConfig(Section):
    """How text becomes samples."""

    tokenizer: Text
    """A sentencepiece `.model`, a Hugging Face `tokenizer.json`, or `bytes`."""
    seq_length: Positive = 1024
    """Tokens per sample."""
    separate_documents: bool = True
    """Documents packed into one sample do not see each other, and positions restart with each."""
    valid: dict[str, Any] = Field(default_factory=dict)
    """What is held out, by name."""


class BlendConfig(TextConfig):
    """Several sources of text, each with its share."""

    train: list[Any] = Field(min_length=1)
    """The training blend; each has a path and a weight."""


class DataConfig(BlendConfig):
    """What is read."""

    train: list[CorpusSource] = Field(min_length=1)
    """The training blend."""
    valid: dict[str, Annotated[HeldOutCorpus, BeforeValidator(_bare_prefix)]] = Field(default_factory=dict)
    """Held-out corpora: name -> prefix, or name -> `{path: prefix, streams: {ref_nll: sidecar}}`. Each is evaluated on all of
    its tokens unless evaluation.max_tokens is set; a sidecar is what evaluation.split_fraction needs."""
    verify: Literal["values", "index"] = "values"
    """What is compared with the manifests before training: `values` reads every corpus and sidecar once (the ranks share the
    work, and a resume does not repeat it), `index` only indexes and sizes."""


class AnswerSource(Section):
    """One file of prompts with answers."""

    path: Text
    """JSON Lines (megarpt/data/answers.py says which records there are)."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Relative share of samples in the blend."""


class ChatConfig(Section):
    """What stands around the messages of a conversation. Special tokens are written by their names."""

    template: Literal["plain", "chatml", "llama3", "gemma"] = "plain"
    """A built-in one. All but `plain` need a tokenizer that has their special tokens."""
    roles: dict[str, Text] = Field(default_factory=dict)
    """Role -> text with `{content}` in it; replaces that of the template, or adds a role."""
    begin: str | None = None
    """What a conversation begins with; null takes the template's."""
    answer_end: str | None = None
    """What an assistant's answer ends with, which is trained on as well; null takes the template's, an empty text the
    tokenizer's end of a document. That end follows the last answer in any case."""


class AnswersConfig(BlendConfig):
    """Prompts with their answers, which alone are trained on."""

    train: list[AnswerSource] = Field(min_length=1)
    """The training blend."""
    valid: dict[str, Text] = Field(default_factory=dict)
    """Held-out files: name -> path. The loss is that of the answers."""
    chat: ChatConfig = Field(default_factory=ChatConfig)
    """How conversations become text; prompts with completions are taken as they are."""
    too_long: Literal["refuse", "leave_out"] = "refuse"
    """A record that does not fit into data.seq_length is an error, or is left out and counted. None is cut."""


class PromptsConfig(TextConfig):
    """What the policy is asked. `data.seq_length` is the length of the rows that rollouts are packed into for training."""

    train: Text
    """Prompts, JSON Lines (megarpt/rl/prompts.py says which records there are)."""
    valid: dict[str, Text] = Field(default_factory=dict)
    """Held-out prompts: name -> file."""
    template: Text = "plain"
    """What is put around a context or question: a name from megarpt/rl/templates.py, or a text with a placeholder."""
    max_prompt_tokens: Positive = 512
    """Longer contexts lose tokens on the left; questions that do not fit are left out."""


class MicroBatchConfig(Section):
    """How many samples are worked on at a time."""

    micro_batch_size: Positive = 8
    """Samples per forward pass and data-parallel rank."""


class BatchConfig(MicroBatchConfig):
    """How many samples make a step."""

    global_batch_size: Positive = 8
    """Samples per optimizer step over all ranks; a multiple of micro_batch_size times the data-parallel size."""


class OptimizerConfig(Section):
    """AdamW and its schedule, counted in tokens."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0.0)] = 3e-5
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay; WSD is warm-up, stable, decay."""
    lr_warmup_tokens: NonNegative = 0
    """Tokens over which the learning rate rises linearly from 0."""
    lr_decay_tokens: Positive | None = None
    """Tokens at which min_lr is reached; null means train.train_tokens."""
    lr_wsd_decay_tokens: NonNegative = 0
    """WSD only: length of the final decay, ending at lr_decay_tokens."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """WSD only: shape of the final decay."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay, not applied to biases and norms."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the second moment."""
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator."""
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    mcore: dict[str, Any] = Field(default_factory=dict)
    """Fields of megatron-core's OptimizerConfig."""


class RLOptimizerConfig(OptimizerConfig):
    """AdamW with the defaults of RPT (arXiv 2506.08007, appendix B) and a constant learning rate."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Learning rate, after the warm-up."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "constant"
    """Shape of the decay; any other than constant needs lr_decay_tokens."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay, not applied to biases and norms."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the second moment."""


class ReferenceConfig(Section):
    """The reference model of an online selection (no sidecar)."""

    checkpoint: Text
    """Run folder or checkpoint of the reference model; its tokenizer must be the run's."""


class SecondSetConfig(Section):
    """A second choice of tokens, made beside the first."""

    scorer: Literal["excess_loss", "loss", "reference_loss", "reference_entropy", "random"]
    """What ranks tokens for it; another one than objective.scorer."""
    fraction: Fraction
    """The share of valid tokens in it."""


class ObjectiveConfig(Section):
    """What a token is worth."""

    scorer: Literal["none", "excess_loss", "loss", "reference_loss", "reference_entropy", "random"] = "none"
    """What ranks tokens: student loss minus reference loss (Rho-1), student loss, low reference loss, low reference
    entropy, or chance. `none` with `uniform` is ordinary language modeling."""
    weighting: Literal["uniform", "top_fraction"] = "uniform"
    """`uniform`: every valid token counts 1. `top_fraction`: the best-scored share counts 1, the rest 0."""
    fraction: Fraction = 1.0
    """top_fraction only: the share of valid tokens that is kept."""
    scope: Literal["sequence", "microbatch", "rank", "global_batch", "lagged_global_batch"] = "global_batch"
    """top_fraction only: the set within which tokens compete. `rank`: all samples of a step on one data-parallel rank, so it
    follows the layout. `global_batch`: all of the step. Both are exact; with more than one micro-batch they cost a scoring
    forward pass where the scorer looks at the student. `lagged_global_batch` costs none: it keeps what reaches the exact
    threshold of the step before, and is for runs that start from trained weights."""
    second: SecondSetConfig | None = None
    """top_fraction only: another set of tokens, chosen in the same scope by another scorer, to combine with the first."""
    combine: Literal["intersection", "union"] = "intersection"
    """With `second`: keep the tokens that are in both sets, or those that are in one of them."""
    reference: ReferenceConfig | None = None
    """Score with this model during training instead of reading the sidecar."""


class DynamicSamplingConfig(Section):
    """Groups that teach nothing, since all their rewards are equal, are replaced by groups of other prompts (DAPO)."""

    start_step: NonNegative = 0
    """Only from this step on."""
    max_rounds: Positive = 4
    """So often prompts are drawn for one step, the first time included."""
    at_cap: Literal["train", "stop"] = "train"
    """With too few groups after that many rounds: train on those there are, or end the run."""


class PolicyConfig(Section):
    """What a sampled token is worth (objectives/policy_gradient.py, rl/advantages.py)."""

    advantage: Literal["group_mean", "group_zscore", "leave_one_out", "length_weighted"] = "group_mean"
    """A reward against those of its group: minus their mean (Dr. GRPO), that over their deviation (GRPO), minus the mean of the
    others (RLOO), minus the mean weighted by length (OPO)."""
    updates_per_rollout: Positive = 1
    """Optimizer steps on the rollouts of a step, each on its own share of them. 1 is on policy."""
    clip_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """The ratio below 1 - clip_low adds nothing more where the advantage is negative."""
    clip_high: Annotated[float, Field(ge=0.0)] = 0.2
    """The ratio above 1 + clip_high adds nothing more where the advantage is positive."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """The ratio above this adds nothing more where the advantage is negative; null for no such bound."""
    reduction: Literal["token", "rollout"] = "token"
    """Divide by the number of tokens, or average over each rollout and then over rollouts."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the KL divergence from the reference policy, which is the policy at the start unless it is reset."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    """How that is estimated from the sampled tokens."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`reward`: a rollout's summed estimate, times kl_coef, is taken from its reward."""
    reference_reset_steps: NonNegative = 0
    """Every this many steps the policy of the moment becomes the reference and the optimizer's state starts afresh; 0 never."""
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the entropy bonus."""
    max_importance_ratio: Annotated[float, Field(ge=1.0)] | None = None
    """Weight tokens by how much likelier the trainer finds them than the engine that drew them, at most by this."""
    log_entropy: bool = True
    """Measure the entropy also where it is no part of the loss."""
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    """Truncated completions: count as they are judged, are left out of the loss, or (with those near the limit) lose reward."""
    overlong_buffer_tokens: NonNegative = 0
    """`penalty` only: over how many tokens before the limit it grows."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Draw other prompts in place of those whose group teaches nothing."""


class RolloutConfig(Section):
    """How completions are drawn."""

    prompts_per_step: Positive = 32
    """Prompts over all ranks; a multiple of the data-parallel size."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt."""
    max_new_tokens: Positive = 512
    """Longer completions are truncated."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of sampling, and of every log-probability in training."""
    top_k: NonNegative = 0
    """Only among the k likeliest tokens; 0 for all."""
    top_p: Fraction = 1.0
    """Only among the likeliest tokens of this mass together."""
    stop: list[Text] = Field(default_factory=list)
    """Texts of single tokens that end a completion, besides the end of a document."""
    engine: Literal["embedded", "server"] = "embedded"
    """`embedded`: the model that trains draws by itself. `server`: an OpenAI-compatible completion server does."""
    max_batch: Positive = 64
    """embedded: completions that a rank draws at the same time."""
    url: Text | None = None
    """server: where it listens, such as http://localhost:8000."""
    weights_dir: Text | None = None
    """server: a folder that it can read as well, where each new version of the weights is put."""


class RLEvaluationConfig(Section):
    """Mean reward of held-out prompts."""

    interval_steps: NonNegative = 0
    """Evaluate every this many steps, besides before and after training; 0 means only then."""
    at_start: bool = True
    """Evaluate before the first step."""
    max_prompts: Positive | None = None
    """Limit per file; null is all of it."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Of sampling; 0 takes the likeliest tokens."""


class StepConfig(Section):
    """What every optimizer step has in common."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights, fp32 main gradients and fp32 losses."""
    max_skipped_steps: NonNegative = 20
    """Stop (exit code 76) after this many skipped steps in a row: not finite, or spikes that stability.on_spike skips. Each is
    skipped on every rank and its batch dumped."""
    head_chunk_tokens: NonNegative = 0
    """At most this many tokens' logits exist at a time; 0 lets the device's cache decide."""
    head_keep_mib: NonNegative | None = None
    """MiB of logits that may be held at a time. The gradients are made in the forward pass, of as many tokens at a time as fit,
    and those of a selection by a guess that the backward pass puts right. Where that is not possible, or too few fit for it to
    pay, logits are held for the backward pass and the others computed again. 0 holds none; null holds 128, or as many as
    stream.memory_budget_gb leaves room for."""


class TrainConfig(StepConfig):
    """How long, and in what precision."""

    train_tokens: Positive
    """Tokens fed through the model before the run is done, rounded up to whole steps."""


class RLTrainConfig(StepConfig):
    """How long, and in what precision."""

    train_steps: Positive
    """How often prompts are drawn, answered, judged and trained on."""


class ParallelConfig(Section):
    """megatron-core's parallel sizes; data parallelism is what is left of the world."""

    tensor_model_parallel_size: Positive = 1
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Shard norm and dropout activations along the sequence over the tensor-parallel ranks."""
    pipeline_model_parallel_size: Positive = 1
    """Stages the layers are divided into, one behind another (schedule 1F1B)."""
    virtual_pipeline_model_parallel_size: Annotated[int, Field(gt=1)] | None = None
    """Pieces of the model on each stage (interleaved schedule): a smaller bubble for more communication; null is one."""
    context_parallel_size: Positive = 1
    """Ranks that share each sequence, every one holding the tokens of two opposite pieces of it."""
    expert_model_parallel_size: Positive = 1
    """Ranks that share the experts of mixture-of-experts layers; they are taken from data and context parallelism."""
    expert_tensor_parallel_size: Positive | None = None
    """Ranks that share each expert's matrices; null takes tensor_model_parallel_size."""
    use_distributed_optimizer: bool = False
    """Divide the optimizer's state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Gather parameters while the next forward pass is already running; needs use_distributed_optimizer."""


class StreamConfig(Section):
    """Layers that keep nothing but their input, and are computed again chunk by chunk in the backward pass (StreamBP)."""

    layers: bool = False
    """Stream all layers. Exact, like recomputation, in a fraction of its memory; excludes model.mcore.recompute_granularity."""
    chunk_tokens: Positive | None = None
    """At most this many of a rank's tokens are worked on at a time. Fewer need less memory, and more time where attention or
    the matrix products become too small to be efficient. null takes 2048, or the most that stream.memory_budget_gb allows."""
    memory_budget_gb: Annotated[float, Field(gt=0.0)] | None = None
    """What a rank may need in all, parameters, gradients and optimizer included, in GB of 10^9 bytes; chooses chunk_tokens.
    `megarpt plan` shows what that gives."""


class EvaluationConfig(Section):
    """Held-out loss on all tokens, comparable across selection rates."""

    interval_steps: NonNegative = 0
    """Evaluate every this many steps, besides before and after training; 0 means only then."""
    at_start: bool = True
    """Evaluate before the first step."""
    max_tokens: Positive | None = None
    """Limit per corpus; null is all of it."""
    micro_batch_size: Positive | None = None
    """Samples per evaluation forward pass; null takes batch.micro_batch_size."""
    split_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Report also the loss of the held-out tokens that selection would keep at this fraction, and of those it would drop, for
    corpora with a known reference loss. null takes objective.fraction; a run that selects nothing then reports none."""


class CheckpointConfig(Section):
    """When the run is saved and what is kept."""

    interval_steps: NonNegative = 0
    """Save every this many steps; 0 saves only at the end and on a signal."""
    keep_last: Positive = 2
    """How many of the newest checkpoints are kept."""
    keep_every_steps: NonNegative = 0
    """Checkpoints whose step is a multiple of this are kept for ever; 0 keeps none."""
    async_save: bool = True
    """Copy the state to host memory and write it while training goes on; false writes it while training waits."""
    resume: bool = True
    """Continue from the newest complete checkpoint in the run folder when there is one."""


class LoggingConfig(Section):
    """What is shown and recorded."""

    interval_steps: Positive = 1
    """Write a metrics line every this many steps."""
    tensorboard: bool = True
    """Write TensorBoard files to `<run.dir>/tensorboard`."""
    histogram_interval_steps: NonNegative = 100
    """Histograms and decoded samples in TensorBoard; 0 turns them off."""
    straggler_interval_steps: NonNegative = 50
    """Compare what the ranks need for their own work every this many steps; 0 never does."""
    wandb_project: Text | None = None
    """Also log to Weights & Biases (extra `wandb`)."""


class StabilityConfig(Section):
    """Loss spikes: robust z-scores of loss and gradient norm, by median and median absolute deviation."""

    spike_threshold: Annotated[float, Field(ge=0.0)] = 0.0
    """A step whose loss or gradient norm lies more than this many robust standard deviations above the median of the window
    is a spike; 0 looks for none. 6 to 10 are usual."""
    spike_window_steps: Annotated[int, Field(ge=8)] = 128
    """The window: this many of the last steps that were applied. Nothing is a spike before it is full."""
    on_spike: Literal["report", "skip", "rollback"] = "report"
    """`report` trains on. `skip` leaves the parameters as they are. `rollback` goes back to the newest checkpoint and does
    not read the samples since then again, those of the spike included; before the first checkpoint it skips."""
    max_rollbacks: NonNegative = 3
    """Stop (exit code 76) when a run needs more rollbacks than this."""


class FaultsConfig(Section):
    """What happens when a job stands still."""

    hang_timeout_minutes: Annotated[float, Field(ge=0.0)] = 20.0
    """End the job (exit code 81) when a rank makes no progress for this long; the stacks of all ranks are written to
    `<run.dir>/faults` first. Must be longer than the longest first step, save or opening of data; 0 waits for ever."""


class ProfileConfig(Section):
    """A trace of a few steps, written to `<run.dir>/profile`."""

    steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step of the trace, such as [10, 12]; the step before them warms the profiler up. null: no trace."""
    ranks: list[NonNegative] = Field(default=[0], min_length=1)
    """Ranks that are recorded, each in a file of its own."""
    record: list[Literal["shapes", "memory", "stacks"]] = Field(default_factory=list)
    """Beyond names and times: shapes of operands, allocations, Python stacks. Each makes steps slower and files larger."""


class VerifierConfig(Section):
    """What says how good a completion is (megarpt/rl/verifiers.py). Options of another kind than `kind` are refused."""

    kind: Literal["next_token", "math", "multiple_choice", "exact", "format"]
    """Which verifier."""
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Its part in the reward; 0 only logs it."""
    name: Text | None = None
    """Of its value in the log; null takes the kind."""
    think_close: Text = "</think>"
    """All but format: ends the thinking; the answer follows."""
    require_thinking: bool = True
    """All but format: without an end of the thinking there is no answer."""
    require_box: bool = False
    """math and multiple_choice: an answer that is not in a box is none."""
    unescape: bool = False
    """next_token and exact: read backslash escapes in a box as LaTeX does."""
    first_token_only: bool = False
    """next_token: exactly the first token is right, nothing longer."""
    any_blanks: bool = True
    """exact: runs of blanks are one, and those at the ends none."""
    pattern: Text | None = None
    """format: the regular expression that a whole completion has to match."""
    limit_s: Annotated[float, Field(gt=0.0)] | None = None
    """math and format: seconds for one completion; null takes 5 and 1."""
    workers: Positive = 2
    """math: processes that judge, on every rank."""


class TrainingConfig(Section):
    """What every training command has; `command` is which one a configuration is for."""

    command: Text
    """The command that a configuration is for."""
    run: RunConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: TextConfig
    batch: MicroBatchConfig = Field(default_factory=MicroBatchConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: StepConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    stream: StreamConfig = Field(default_factory=StreamConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)


class LanguageModelConfig(TrainingConfig):
    """Training on given text, token by token."""

    data: BlendConfig
    batch: BatchConfig = Field(default_factory=BatchConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    stability: StabilityConfig = Field(default_factory=StabilityConfig)


class PretrainConfig(LanguageModelConfig):
    """`megarpt pretrain`."""

    command: Literal["pretrain"] = "pretrain"
    """The command that a configuration is for."""
    data: DataConfig


class SftConfig(LanguageModelConfig):
    """`megarpt sft`."""

    command: Literal["sft"] = "sft"
    """The command that a configuration is for."""
    data: AnswersConfig


class RLConfig(TrainingConfig):
    """`megarpt rl`."""

    command: Literal["rl"] = "rl"
    """The command that a configuration is for."""
    data: PromptsConfig
    optimizer: RLOptimizerConfig = Field(default_factory=RLOptimizerConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    verifiers: list[VerifierConfig] = Field(min_length=1)
    """Each says what a completion is worth; the reward is their weighted sum."""
    objective: PolicyConfig = Field(default_factory=PolicyConfig)
    train: RLTrainConfig
    evaluation: RLEvaluationConfig = Field(default_factory=RLEvaluationConfig)


COMMANDS: dict[str, type[TrainingConfig]] = {"pretrain": PretrainConfig, "sft": SftConfig, "rl": RLConfig}
"""Which configuration a training command takes."""


class ScoreOptions(Section):
    """`megarpt score`."""

    reference: Text
    """Run folder or checkpoint of the reference model."""
    corpus: Text
    """Prefix of the corpus to score."""
    output_prefix: Text | None = None
    """Prefix of the sidecar; with several streams each gets `<output_prefix>_<stream>`. null means `<corpus>_<stream>`."""
    streams: tuple[Stream, ...] = Field(default=("ref_nll",), min_length=1)
    """What is written: `ref_nll` (nats per label), `ref_entropy` (nats, of the reference's next-token distribution)."""
    seq_length: Positive | None = None
    """Tokens per window; must be the training run's. null takes the reference run's."""
    micro_batch_size: Positive = 8
    """Windows per forward pass."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model is divided over the ranks; data parallelism is what is left of the world."""
    device: Device = "auto"
    """`auto` takes CUDA when it is usable."""
    separate_documents: bool = True
    """Documents in one window do not see each other; must be the training run's data.separate_documents."""

    def prefixes(self) -> dict[str, str]:
        """Where each stream is written: stream name -> file prefix."""
        if self.output_prefix is not None and len(self.streams) == 1:
            return {self.streams[0]: self.output_prefix}
        return {name: f"{self.output_prefix or self.corpus}_{name}" for name in self.streams}


class EvaluateOptions(Section):
    """`megarpt evaluate`."""

    checkpoint: Text
    """Run folder or checkpoint."""
    corpora: dict[str, Text] = Field(default_factory=dict)
    """Held-out corpora: name -> prefix. Empty takes data.valid of the run."""
    max_tokens: Positive | None = None
    """Limit per corpus; null is all of it."""
    micro_batch_size: Positive | None = None
    """Windows per forward pass; null takes the run's."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model is divided over the ranks; data parallelism is what is left of the world."""
    device: Device = "auto"
    """`auto` takes CUDA when it is usable."""
    output: Literal["table", "json"] = "table"
    """`table` for people, `json` for programs: one object on standard output."""


class EvaluateAnswersOptions(Section):
    """`megarpt evaluate --questions`."""

    checkpoint: Text
    """Run folder or checkpoint."""
    questions: dict[str, Text] = Field(min_length=1)
    """Questions or next-token prompts (megarpt/rl/prompts.py says which records there are): name -> file."""
    mode: Literal["both", "reasoning", "plain"] = "both"
    """Next-token prompts only: after a thought, without one (the likeliest next token), or both."""
    template: Text | None = None
    """What is put around a context or question; null takes that of the run, which then is one of `megarpt rl`."""
    verifiers: list[VerifierConfig] = Field(default_factory=list)
    """What says whether an answer is right; empty takes those of the run, which then is one of `megarpt rl`."""
    greedy: bool = True
    """Draw one answer of the likeliest tokens."""
    samples: NonNegative = 0
    """Also draw this many answers to every question, for pass@k."""
    k: tuple[Positive, ...] = ()
    """The k of pass@k, at most `samples`; empty takes the powers of two up to it, and itself."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the samples."""
    top_k: NonNegative = 0
    """Samples only: among the k likeliest tokens; 0 for all."""
    top_p: Fraction = 1.0
    """Samples only: among the likeliest tokens of this mass together."""
    seed: NonNegative = 1234
    """Seeds the samples, and the resampling of questions for intervals."""
    max_new_tokens: Positive | None = None
    """Longer answers are cut off, and wrong; null takes rollout.max_new_tokens of a run of `megarpt rl`, else 256."""
    max_prompt_tokens: Positive | None = None
    """Longer contexts lose tokens on the left, and questions that do not fit are left out; null takes data.max_prompt_tokens of
    a run of `megarpt rl`, else what data.seq_length of the run leaves."""
    max_questions: Positive | None = None
    """Only the first so many of each file; null is all."""
    stop: tuple[Text, ...] | None = None
    """Texts of single tokens that end an answer, besides the end of a document; null takes those of a run of `megarpt rl`."""
    max_batch: Positive = 64
    """Answers that a rank draws at the same time."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model is divided over the ranks; data parallelism is what is left of the world."""
    device: Device = "auto"
    """`auto` takes CUDA when it is usable."""
    output: Literal["table", "json"] = "table"
    """`table` for people, `json` for programs: one object on standard output."""


class GenerateOptions(Section):
    """`megarpt generate`."""

    checkpoint: Text
    """Run folder or checkpoint."""
    prompt: str
    """The text to continue."""
    max_new_tokens: Positive = 64
    """Stop after this many tokens, or earlier at the end of the document."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: NonNegative = 0
    """Sample among this many most likely tokens; 0 is all."""
    top_p: Fraction = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    seed: NonNegative = 1234
    """Seeds the sampling."""
    num_samples: Positive = 1
    """Continuations to write."""
    device: Device = "auto"
    """`auto` takes CUDA when it is usable."""


class ServeOptions(Section):
    """`megarpt serve`."""

    checkpoint: Text
    """Run folder or checkpoint."""
    host: Text = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, whoever they are."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 takes a free one."""
    max_batch: Positive = 64
    """Completions that are drawn at the same time; others wait."""
    max_waiting: Positive = 65536
    """Completions that may wait or be drawn; who asks for more is told to come back later (status 503)."""
    max_sequence_length: Positive | None = None
    """Tokens of a prompt with its completion; null takes the run's data.seq_length."""
    name: Text | None = None
    """Of the model, for clients; null takes the checkpoint as it was given."""
    weights_dir: Text | None = None
    """Weights may be taken over from folders in this one, a run's rollout.weights_dir; null takes none."""
    device: Device = "auto"
    """`auto` takes CUDA when it is usable."""


class VerifyResumeOptions(Section):
    """`megarpt verify-resume`."""

    steps: Annotated[int, Field(ge=4)] = 20
    """Steps of each run; the resume is in the middle."""
    nproc_per_node: Positive = 1
    """Ranks to run on this machine; 1 under a launcher, which starts the command once per rank."""
    keep: bool = False
    """Keep the runs also when they are equal."""


class PlanOptions(Section):
    """`megarpt plan`."""

    card_gb: Annotated[float, Field(gt=0.0)] = 80.0
    """Memory of a device in GB of 10^9 bytes; the longest sequences are those that fit it."""
    budget_gb: Annotated[float, Field(gt=0.0)] | None = None
    """Memory that a rank may need, in GB of 10^9 bytes, for which a chunk is chosen; null takes stream.memory_budget_gb."""
    world_size: Positive | None = None
    """Number of ranks; null is the smallest that holds one copy of the model."""
    device: Device = "auto"
    """Whose kernels are planned for; `auto` takes run.device, and CUDA where that says auto too."""
    plot: Text | None = None
    """Also draw memory against sequence length into this file (.png, .svg, .pdf)."""
    json_output: bool = False
    """One JSON object on standard output."""


class ExportOptions(Section):
    """`megarpt export`."""

    checkpoint: Text
    """Run folder or checkpoint."""
    output: Text
    """The folder to make."""


class SubmitOptions(Section):
    """`megarpt submit`."""

    nodes: Positive
    """Nodes of the cluster."""
    time: Text
    """Time limit of one allocation, as Slurm writes it; the job is requeued until the run is finished."""
    gpus_per_node: NonNegative = 8
    """GPUs of each node; 0 trains on CPUs."""
    ranks_per_node: Positive | None = None
    """Processes on each node; null is one for each GPU, or one where there are none."""
    partition: Text | None = None
    """Slurm's partition; null takes the cluster's default."""
    account: Text | None = None
    """Slurm's account; null takes the user's default."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, each with its two dashes; they win over the script's own."""
    dry_run: bool = False
    """Show the script; submit and write nothing."""

    def ranks(self) -> int:
        """Processes on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1
