"""Train the small language model that ships inside the package: its tokeniser and its weights.

    python tools/embedded_model.py --text stories.txt --valid valid.txt --out model/

A Llama of 2.8 M parameters (5 layers of width 192, context 256) with byte-level BPE of 3,072 pieces, trained on simple
English stories, one story per blank-line-separated block. About 80 minutes on one CPU core.
The state is written every few minutes, and the command goes on from there when it is started again; training.json says
in the end what was trained on what. embedded_card.py measures the model and writes its card.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from apportion.disk import read_json, write_json, write_tensors
from apportion.recipes.command import main

logger = logging.getLogger("apportion.embedded_model")

END = "<|end|>"
"""Stands before every story; both BOS and EOS."""


@dataclass(frozen=True, kw_only=True)
class TrainModel:
    """Train the embedded language model."""

    text: Path
    """Stories to train on, separated by blank lines."""
    valid: Path
    """Stories to validate on, in the same form; never trained on."""
    out: Path
    """Folder for the model, in the layout that transformers loads."""
    vocab_size: int = 3072
    hidden_size: int = 192
    layers: int = 5
    heads: int = 6
    intermediate_size: int = 512
    context_tokens: int = 256
    batch_contexts: int = 16
    tokens: int = 32_000_000
    """Tokens to train on, over all epochs."""
    lr: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    save_every_steps: int = 200

    def run(self) -> None:
        torch.manual_seed(self.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        texts = {name: stories(file) for name, file in (("train", self.text), ("valid", self.valid))}
        tokenizer = self.tokenizer(texts["train"])
        train, valid = (self.contexts(tokenizer, texts[name], name) for name in ("train", "valid"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = self.model(tokenizer).to(device)
        optimizer = torch.optim.AdamW(
            groups(model, self.weight_decay), lr=self.lr, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        total = self.tokens // (self.batch_contexts * self.context_tokens)
        done = self.load_state(model, optimizer)
        started, average, tokens = time.perf_counter(), None, 0
        for step, contexts in enumerate(self.batches(train, total)):
            tokens += contexts.numel()
            if step < done:
                continue
            for group in optimizer.param_groups:
                group["lr"] = self.lr * schedule(step, total)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model, contexts.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            if (step + 1) % 20 == 0:
                rate = (step + 1 - done) / (time.perf_counter() - started)
                logger.info("step %d/%d loss %.3f, %.0f min left", step + 1, total, average, (total - step) / rate / 60)
            if (step + 1) % self.save_every_steps == 0 or step + 1 == total:
                logger.info("validation loss %.4f", validation_loss(model, valid[:200].to(device)))
                self.save_state(model, optimizer, step + 1)
        save(model, tokenizer, self.out)
        sizes = {
            name: {"stories": len(texts[name]), "characters": sum(map(len, texts[name])), "tokens": contexts.numel()}
            for name, contexts in (("train", train), ("valid", valid))
        }
        settings = {key: value for key, value in asdict(self).items() if not isinstance(value, Path)}
        write_json(self.out / "training.json", {"settings": settings, "tokens_seen": tokens, **sizes})
        sys.stdout.write(f"{self.out}: {sum(p.numel() for p in model.parameters()):,} parameters\n")

    def contexts(self, tokenizer: Any, texts: list[str], name: str) -> Int[Tensor, "n context"]:
        """All stories end to end, each behind END, cut into contexts."""
        each = tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [token for encoded in each for token in (tokenizer.bos_token_id, *encoded)]
        if not (count := len(ids) // self.context_tokens):
            raise ValueError(f"The {name} text holds less than one context of {self.context_tokens} tokens: give more.")
        return torch.tensor(ids[: count * self.context_tokens]).reshape(count, self.context_tokens)

    def tokenizer(self, texts: list[str]) -> Any:
        """Byte-level BPE trained on the text, or the one that lies in the folder already."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if (self.out / "tokenizer.json").exists():
            return AutoTokenizer.from_pretrained(self.out, trust_remote_code=False)
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
        tokenizer.save_pretrained(self.out)
        return tokenizer

    def model(self, tokenizer: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.context_tokens,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.02,
        )
        return LlamaForCausalLM(config)

    def batches(self, contexts: Int[Tensor, "n context"], total: int) -> Iterator[Int[Tensor, "batch context"]]:
        """Epoch after epoch in new orders, `total` batches in all."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for chosen in torch.randperm(len(contexts), generator=generator).split(self.batch_contexts):
                if total == 0:
                    return
                total -= 1
                yield contexts[chosen]

    def save_state(self, model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
        tensors = {f"model.{name}": p.detach().cpu() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            tensors |= {f"adam.{name}.{key}": value.cpu() for key, value in optimizer.state[p].items()}
        write_tensors(self.out / "state.safetensors", tensors | {"steps": torch.tensor(steps)})

    def load_state(self, model: Any, optimizer: torch.optim.Optimizer) -> int:
        from safetensors.torch import load_file

        if not (self.out / "state.safetensors").exists():
            return 0
        tensors = load_file(self.out / "state.safetensors")
        for name, p in model.named_parameters():
            p.data.copy_(tensors[f"model.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[p] = {key: tensors[f"adam.{name}.{key}"].to(p.device) for key in keys}
        return int(tensors["steps"])


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """The files that are shipped: half precision, and configurations that transformers 4.56 and later read alike."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        left_out = ("transformers_version", "_from_model_config")
        write_json(folder / name, {k: v for k, v in read_json(folder / name).items() if k not in left_out})
    special = {f"{kind}_token": END for kind in ("bos", "eos", "pad")}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def stories(file: Path) -> list[str]:
    """The stories of a file: its blank-line-separated blocks, or what stands between <|endoftext|> in TinyStories.

    Within a story paragraphs end with a single newline.
    """
    if not file.is_file():
        raise ValueError(f"There is no text at {file}: give a file of stories.")
    text = file.read_text(encoding="utf-8")
    if "<|endoftext|>" in text:
        blocks = (re.sub(r"\n\s*\n", "\n", block.strip()) for block in text.split("<|endoftext|>"))
    else:
        blocks = (block.strip() for block in text.split("\n\n"))
    return [block for block in blocks if block]


def groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def schedule(step: int, total: int) -> float:
    """Linear warm-up over 2 %, then a half cosine down to a fiftieth."""
    warmup = max(1, total // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def loss_of(model: Any, contexts: Int[Tensor, "n context"]) -> Tensor:
    logits = model(input_ids=contexts, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), contexts[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: Any, contexts: Int[Tensor, "n context"]) -> float:
    """Mean cross-entropy in nats per token."""
    losses = [loss_of(model, part).item() * len(part) for part in contexts.split(16)]
    return sum(losses) / len(contexts)


if __name__ == "__main__":
    sys.exit(main(TrainModel, "embedded_model", __doc__, prog="python tools/embedded_model.py"))
