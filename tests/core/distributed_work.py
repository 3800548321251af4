"""Both stages as `torchrun` runs them: python -m tests.core.distributed_work WORK_DIR [STAGE], killed in STAGE."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from lolcats_common.params import FinetuneParams, TransferParams
from lolcats_core.compute import distributed
from lolcats_core.export.delta import fingerprint
from lolcats_core.export.merging import base_fingerprint, save_merged
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.streaming.layerwise import LayerwiseModel
from lolcats_core.streaming.student import load_student
from lolcats_core.streaming.weights import WeightFiles
from lolcats_core.training.attention_transfer import attention_transfer
from lolcats_core.training.low_rank_finetune import low_rank_finetune
from lolcats_core.training.streamed_transfer import streamed_attention_transfer
from tests.core.tiny import SETTINGS, FakeRows

# Six rows in a step: not a multiple of four processes.
TRANSFER = TransferParams(
    batch_size=6, epochs=2, eval_every=4, checkpoint_every=2, log_every=2, max_eval_rows=7, plateau_patience=0
)
FINETUNE = FinetuneParams(
    loss="mixed", batch_size=6, epochs=2, eval_every=4, checkpoint_every=2, log_every=2, lora_rank=2, lr=1e-2
)


class MaskedRows(FakeRows):
    """Rows of which a different share counts each."""

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        batch = super().batch(indices)
        first = torch.as_tensor(np.asarray(indices))[:, None]
        return {**batch, "loss_mask": torch.arange(self.sequence_length)[None] > first}


def main(work: Path, dies_in: str = "") -> None:
    device = distributed.start(torch.device("cpu"))
    folder = work / "teacher"
    config = AutoConfig.from_pretrained(folder)
    rows, validation = FakeRows(24), FakeRows(7, seed=1)

    def log_of(stage: str) -> Callable[[dict[str, float], int], None]:
        def log(metrics: dict[str, float], step: int) -> None:
            assert distributed.is_main()
            # A streamed run logs the last layer last.
            if stage == dies_in and step == 6 and (stage != "streamed" or "train_layer_001" in metrics):
                os.kill(os.getpid(), signal.SIGKILL)

        return log

    student = load_student(folder, config, SETTINGS, device=device, dtype=torch.float32)
    joint = attention_transfer(student, rows, validation, TRANSFER, scratch=work / "joint", log=log_of("joint"))
    transferred = {name: p.detach().clone() for name, p in named_map_parameters(student).items()}
    maps, streamed, _ = streamed_attention_transfer(
        LayerwiseModel.open(folder, config, settings=SETTINGS, device=device, dtype=torch.float32),
        rows,
        validation,
        TRANSFER,
        scratch=work / "streamed",
        log=log_of("streamed"),
        block_bytes=6 * 40 * 32 * 4,
    )
    adapted, finetuned = low_rank_finetune(
        student, MaskedRows(24), MaskedRows(7, seed=1), FINETUNE, scratch=work / "finetune", log=log_of("finetune")
    )
    lora = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    if distributed.is_main():
        files = WeightFiles(folder)
        save_merged(adapted, files, torch.float32, work / "model", shard=40_000)
        weights = base_fingerprint(adapted.get_base_model(), files, torch.float32)
        if distributed.world() == 1:
            assert weights == fingerprint(adapted)
        results = {"joint": joint, "streamed": streamed, "finetune": finetuned}
        histories = {name: result.history for name, result in results.items()}
        tensors = {"joint": transferred, "streamed": maps, "finetune": lora}
        torch.save({"histories": histories, "tensors": tensors, "weights": weights}, work / "result.pt")
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
