"""The autoregressive reward model in training: a LoRA adapter of the base under the ARM loss.

Shapes: B pairs (in a batch: its prompts), T positions, N response tokens, S responses, D features.
"""

from typing import Any

import lightning as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from pipeline.config import Arm, Trainer, UserError
from pipeline.losses import all_finite, arm_loss, response_logps, reward_metrics, token_logps
from pipeline.store import digest


def attach_adapter(model: PreTrainedModel, arm: Arm, seed: int) -> PeftModel:
    """The base with a fresh trainable LoRA adapter in float32, drawn from the seed.

    On a CPU attention is left to plain matrix products: torch's fused kernel for CPUs is slower backwards.

    Raises:
        UserError: the target modules are not in the model, or its logits are not simply its head's output.
    """
    targets: str | list[str] = arm.targets if arm.targets == "all-linear" else arm.targets.split(",")
    config = LoraConfig(
        r=arm.rank, lora_alpha=arm.lora_alpha, lora_dropout=arm.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    _check_head(model)
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")
    L.seed_everything(seed, verbose=False)
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UserError(f"arm.targets {arm.targets}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Refuse a model that scales or caps its logits behind the head, which `pair_logps` goes around."""
    ids = torch.arange(8, device=model.device)[None]
    wanted, found = model(ids).logits, model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
    if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"base: {model.config.model_type} changes its logits behind the head, which training does not follow: "
            "use another."
        )


def attention_mask(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T]: a token sees the prompt and its own response up to itself."""
    earlier_TT = torch.ones(2 * segments_BT.shape[1:], dtype=torch.bool, device=segments_BT.device).tril()
    key_B1T, query_BT1 = segments_BT[:, None, :], segments_BT[:, :, None]
    visible = earlier_TT & ((key_B1T == 0) | (key_B1T == query_BT1))
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def pair_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed response log-probabilities of a collated batch's pairs: chosen_logps_B, rejected_logps_B.

    The head sees the positions that predict a response token, and nothing else.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden_BTD = causal.base_model(
        input_ids=batch["ids"],
        attention_mask=attention_mask(batch["segments"], next(model.parameters()).dtype),
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    head = causal.get_output_embeddings()
    logps_N = token_logps(hidden_BTD[batch["row"], batch["column"]], head.weight, batch["label"], head.bias)
    logps_S = response_logps(logps_N, batch["response"])
    return logps_S[batch["chosen"]], logps_S[batch["rejected"]]


class ARM(L.LightningModule):
    """Trains one adapter; metrics carry TRL's names (`rewards/margins`, `rewards/accuracies`, …)."""

    def __init__(self, model: PeftModel, beta: float, trainer: Trainer, steps: int, seed: int) -> None:
        super().__init__()
        # Lightning's own estimate of the steps would set up the data before a checkpoint could say where to resume.
        self._steps = steps
        self.model = model
        self._beta, self._config, self._seed = beta, trainer, seed
        self.strict_loading = False  # checkpoints hold the adapter only
        self.history: list[dict[str, float]] = []

    def on_train_start(self) -> None:
        """Hugging Face models load in eval mode and Lightning leaves them there: LoRA's dropout would be off."""
        self.model.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout is a function of seed and step, so that a resumed run draws what an uninterrupted one would."""
        torch.manual_seed(int(digest([self._seed, self.current_epoch, batch_idx])[:15], 16))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The ARM loss of a batch of pairs.

        Raises:
            UserError: the loss is not finite; the last checkpoint is kept.
        """
        chosen_B, rejected_B = pair_logps(self.model, batch)
        loss = arm_loss(chosen_B, rejected_B, self._beta).mean()
        if not all_finite([loss]):
            raise UserError(
                f"the training loss is {loss.item()} at step {self.global_step}: training stopped and the last good "
                "checkpoint was kept: lower trainer.lr or check the data."
            )
        metrics = {"loss": loss.detach(), **reward_metrics(chosen_B, rejected_B, self._beta)}
        self._record("train", metrics, len(chosen_B))
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=len(chosen_B))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

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
        chosen_B, rejected_B = pair_logps(self.model, batch)
        loss = arm_loss(chosen_B, rejected_B, self._beta).mean()
        metrics = {"loss": loss, **reward_metrics(chosen_B, rejected_B, self._beta)}
        self.log_dict({f"eval/{name}": value for name, value in metrics.items()}, batch_size=len(chosen_B))

    def on_validation_epoch_end(self) -> None:
        """Keep the curve; Lightning has averaged over the pairs."""
        if not self.trainer.sanity_checking:
            averaged = {
                name.removeprefix("eval/"): value
                for name, value in self.trainer.callback_metrics.items()
                if name.startswith("eval/")
            }
            self._record("eval", averaged, 0)

    def _record(self, phase: str, metrics: dict[str, Tensor], pairs: int) -> None:
        row = {name: round(float(value), 6) for name, value in metrics.items()}
        self.history.append({"step": self.global_step, "phase": phase, "pairs": pairs, **row})  # type: ignore[dict-item]

    def configure_optimizers(self) -> Any:
        """AdamW on the adapter, warm-up then the configured schedule, per optimizer step."""
        config = self._config
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
        schedule = get_scheduler(
            config.scheduler, optimizer, num_warmup_steps=min(config.warmup_steps, self._steps // 2),
            num_training_steps=self._steps,
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter and the curve; the frozen base is on disk already."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the curve up again, and make sure that no trainable weight is missing."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        if trainable != checkpoint["state_dict"].keys():
            raise UserError("the checkpoint is of another adapter: remove its folder below scratch/ to train anew.")
        self.history = list(checkpoint["history"])
