"""The autoregressive reward model in training: the base, or a LoRA adapter of it, under a preference loss.

Shapes: B pairs (in a batch: its prompts), T positions, N response tokens, S responses, D features, O objectives.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel, get_scheduler

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm, Loss, Trainer
from pipeline.data.files import digest
from pipeline.models.architecture import check_architecture
from pipeline.training.attention import RECOMPUTED, attention_mask
from pipeline.training.losses import (
    all_finite,
    implicit_rewards,
    preference_loss,
    response_logps,
    reward_metrics,
    token_logps,
)


def trainable(
    model: PreTrainedModel, arm: Arm, seed: int, device: torch.device, checkpointing: bool = False
) -> PreTrainedModel | PeftModel:
    """The base ready for training: with a fresh LoRA adapter in float32, drawn from the seed, or whole.

    Args:
        model: the base; one that is trained whole comes in float32, for its weights are the master weights.
        arm: what is trained.
        seed: of the adapter's start.
        device: where it will be trained, whether it is there yet or not.
        checkpointing: keep only the input of each layer for the backward pass and compute the rest again.

    Raises:
        UserError: the target modules are not in the model, its logits are not simply its head's output, or its
            attention is of a kind that training does not follow.
    """
    check_architecture(model.config, "the base")
    _check(model, device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # or the embeddings, which do not learn, would cut the layers off
    if arm.tuning == "full":
        return model.requires_grad_(True)
    targets: str | list[str] = arm.targets if arm.targets == "all-linear" else arm.targets.split(",")
    config = LoraConfig(
        r=arm.rank, lora_alpha=arm.lora_alpha, lora_dropout=arm.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    L.seed_everything(seed, verbose=False)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UserError(f"arm.targets {arm.targets}: {str(error).splitlines()[0]}") from error
    _check_adapted(adapted)
    return adapted


@torch.no_grad()
def _check_adapted(model: PeftModel) -> None:
    """Refuse layers whose rows the decoder could not tell apart: in batches they must see [row, time, feature]."""
    flat: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: flat.append(name) if args[0].dim() != 3 else None)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and isinstance(layer, nn.Module)
    ]
    model(**_short(model))
    for hook in hooks:
        hook.remove()
    if flat:
        raise UserError(
            f"base: {flat[0].removeprefix('base_model.model.')} sees all rows of a batch as one, so its adapter could "
            "not be decoded with: leave it out of arm.targets (q_proj,v_proj), or set arm.tuning=full."
        )


def _short(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Eight tokens, as models are asked in training."""
    ids = torch.arange(8, device=model.device)[None]
    return {"input_ids": ids, "position_ids": ids, "attention_mask": attention_mask(torch.zeros_like(ids), model.dtype)}


@torch.no_grad()
def _check(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse a model that does anything behind its head, which training goes around; on CPUs choose the attention."""
    how = _short(model)

    def logits() -> Tensor:
        hidden_BTD = model.base_model(**how).last_hidden_state
        logits_BTV: Tensor = model.get_output_embeddings()(hidden_BTD)
        return logits_BTV

    wanted = model(**how).logits
    if (logits() - wanted).norm() > 1e-3 * wanted.norm():
        raise UserError(
            f"base: {model.config.model_type} changes its logits behind the head, which training does not follow: "
            "use another."
        )
    if device.type == "cpu":
        model.set_attn_implementation(RECOMPUTED)
        if (logits() - wanted).norm() > 0.05 * wanted.norm():
            raise UserError(
                f"base: {model.config.model_type} has an attention of its own kind, which training on a CPU does not "
                "follow: use another."
            )


class ResponseModel(nn.Module):
    """log π_r(y|x) of every response of a batch, as one forward that can be replicated or sharded.

    The head sees the positions that predict a response token, and nothing else. Weights in float32 are multiplied in
    `dtype` (autocast), and adapters take the activations as they are, so no float32 copy of them is kept.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    @property
    def causal(self) -> PreTrainedModel:
        """The causal LM, below the adapter if there is one."""
        model: Any = self.model
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return causal

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed response log-probabilities of a collated batch: logps_S, float32 or better."""
        with self._mixed(batch):
            head: Any = self.causal.get_output_embeddings()
            hidden_ND = self._states(batch)[batch["row"], batch["column"]]
            logps_N = token_logps(hidden_ND, head.weight, batch["label"], head.bias)
        return response_logps(logps_N, batch["response"])

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """What the head would see at the positions that predict a response token: hidden_ND."""
        with self._mixed(batch):
            return self._states(batch)[batch["row"], batch["column"]]

    @contextmanager
    def _mixed(self, batch: dict[str, Tensor]) -> Iterator[None]:
        low = self.dtype.itemsize < 4
        mixed = torch.autocast(batch["ids"].device.type, self.dtype, enabled=low)
        with mixed, disable_input_dtype_casting(self.model, active=low):
            yield

    def _states(self, batch: dict[str, Tensor]) -> Tensor:
        causal: Any = self.causal
        hidden_BTD: Tensor = causal.base_model(
            input_ids=batch["ids"],
            attention_mask=attention_mask(batch["segments"], self.dtype),
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        return hidden_BTD


_METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "pairs",
)  # fmt: skip


CURVE = ("step", "phase", "pairs", *(name for name in _METRICS if name != "pairs"))  # columns of the history


class ARM(L.LightningModule):
    """Trains one ARM; metrics carry TRL's names (`rewards/margins`, `rewards/accuracies`, …).

    Args:
        model: what is trained.
        terms: for each objective that pairs are of, β and how much a pair's loss counts.
        loss: of a pair.
        trainer: the run.
        steps: optimizer steps of the whole run.
        seed: of dropout.
    """

    beta_O: Tensor
    weight_O: Tensor

    def __init__(
        self, model: ResponseModel, terms: Sequence[tuple[float, float]], loss: Loss, trainer: Trainer, steps: int,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        # Lightning's own estimate of the steps would set up the data before a checkpoint could say where to resume.
        self._steps = steps
        self.model = model
        self._loss, self._config, self._seed = loss, trainer, seed
        betas, weights = torch.tensor(terms).unbind(1)
        self.register_buffer("beta_O", betas, persistent=False)
        self.register_buffer("weight_O", weights, persistent=False)
        self.strict_loading = False  # checkpoints hold what is trained only
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}  # of the metrics of this step's pairs so far
        self._tokens, self._positions = 0, 0  # computed by this process, without and with padding

    def configure_model(self) -> None:
        """Under FSDP shard every layer, and the rest with the whole."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.device_mesh is not None:
            mesh, dtype = self.device_mesh["data_parallel"], self.model.dtype
            mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for module in (*_layers(self.model.causal), self.model):
                fully_shard(module, mesh=mesh, mp_policy=mixed)

    def on_train_start(self) -> None:
        """Hugging Face models load in eval mode and Lightning leaves them there: LoRA's dropout would be off."""
        self.model.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout is a function of seed and step, so that a resumed run draws what an uninterrupted one would."""
        torch.manual_seed(int(digest([self._seed, self.current_epoch, batch_idx, self.global_rank])[:15], 16))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The share of a micro-batch in the mean loss of the step's pairs.

        Raises:
            UserError: the loss is not finite; the last checkpoint is kept.
        """
        loss_B, metrics = self._pairs(batch)
        if not all_finite([loss_B]):
            raise UserError(
                f"the training loss is {loss_B.mean().item()} at step {self.global_step}: training stopped and the "
                "last good checkpoint was kept: lower trainer.lr or check the data."
            )
        if batch["weight"] > 0:
            self._tokens += int((batch["segments"] >= 0).sum())
            self._positions += batch["segments"].numel()
            for name, value_B in metrics.items():
                self._sums[name] = self._sums.get(name, 0) + value_B.sum()
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._end_step()
        return loss_B.sum() * batch["weight"]

    def _pairs(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair, and its metrics."""
        logps_S = self.model(batch)
        reward_S = implicit_rewards(self._loss, logps_S, batch["response"], batch.get("reference"))
        chosen_B, rejected_B = reward_S[batch["chosen"]], reward_S[batch["rejected"]]
        beta_B = self.beta_O[batch["objective"]]
        loss_B = preference_loss(self._loss, chosen_B, rejected_B, beta_B) * self.weights_of(batch["objective"])
        metrics = {
            "loss": loss_B.detach(),
            **reward_metrics(chosen_B, rejected_B, beta_B),
            "logps/chosen": logps_S.detach()[batch["chosen"]],
            "logps/rejected": logps_S.detach()[batch["rejected"]],
            "pairs": torch.ones_like(loss_B),
        }
        return loss_B, metrics

    def weights_of(self, objective_B: Tensor) -> Tensor:
        """How much the loss of each pair counts: weight_B."""
        return self.weight_O[objective_B]

    def _end_step(self) -> None:
        """Means over the pairs of the step, those of all its micro-batches and processes."""
        sums = self._sums or {name: torch.zeros((), device=self.device) for name in _METRICS}
        summed = self.trainer.strategy.reduce(torch.stack([sums[name] for name in _METRICS]), reduce_op="sum")
        *values, pairs = summed.tolist()
        means = {name: value / pairs for name, value in zip(_METRICS, values, strict=False)}
        self._sums = {}
        self._record("train", means, int(pairs))
        logged = means | {"padding": self.padding}
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, batch_size=1)
        self.log("loss", means["loss"], prog_bar=True, logger=False, batch_size=1)

    @property
    def padding(self) -> float:
        """The share of computed positions that held no token."""
        return 1 - self._tokens / max(1, self._positions)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """A step with a NaN gradient would spoil the weights that the next checkpoint saves.

        Raises:
            UserError: a gradient is not finite.
        """
        if not all_finite([p.grad for p in self.parameters() if p.grad is not None]):
            raise UserError(
                f"a gradient is not finite at step {self.global_step}: training stopped and the last good checkpoint "
                "was kept: lower trainer.lr or check the data."
            )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and reward metrics on held-out pairs."""
        _, metrics = self._pairs(batch)
        pairs = len(metrics.pop("pairs"))
        self.log_dict(
            {f"eval/{name}": value.mean() for name, value in metrics.items()}, batch_size=pairs, sync_dist=True
        )

    def on_validation_epoch_end(self) -> None:
        """Keep the curve; Lightning has averaged over the pairs."""
        averaged = {
            name.removeprefix("eval/"): float(value)
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith("eval/")
        }
        self._record("eval", averaged, 0)

    def _record(self, phase: str, metrics: dict[str, float], pairs: int) -> None:
        row = {name: round(value, 6) for name, value in metrics.items()}
        self.history.append({"step": self.global_step, "phase": phase, "pairs": pairs, **row})  # type: ignore[dict-item]

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, warm-up then the configured schedule, per optimizer step."""
        config = self._config
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=config.lr, weight_decay=config.weight_decay)
        warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * self._steps
        schedule = get_scheduler(
            config.scheduler, optimizer, num_warmup_steps=min(round(warmup), self._steps // 2),
            num_training_steps=self._steps,
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and the curve; the frozen base is on disk already."""
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learning}
        checkpoint["history"], checkpoint["computed"] = self.history, (self._tokens, self._positions)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the curve up again, and make sure that no trainable weight is missing."""
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        # Under FSDP the strategy has taken the weights out already.
        if learning != checkpoint.get("state_dict", dict.fromkeys(learning)).keys():
            raise UserError("the checkpoint is of another ARM: remove its folder below scratch/ to train anew.")
        self.history = list(checkpoint["history"])
        self._tokens, self._positions = checkpoint["computed"]


def _layers(causal: PreTrainedModel) -> Iterable[nn.Module]:
    """The decoder layers, which transformers lists as those it will not split."""
    names = set(causal._no_split_modules or [])
    return [module for module in causal.modules() if type(module).__name__ in names]
