#!/usr/bin/env python3
"""Trains BERT to tell what a fortune is about, with Hugging Face's Trainer."""

import argparse
import pathlib

import torch
from microbatch.integrations.transformers import Trainer
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

TOPICS = ["computers", "food", "law", "love", "science", "sports"]


def read_samples(folder, longest=128):
    """Bytes of texts, each with its topic; every eighth is held out."""
    samples = []
    for label, topic in enumerate(TOPICS):
        for text in (pathlib.Path(folder) / topic).read_text(encoding="utf-8").split("\n%\n"):
            if len(text) > 1:
                samples.append({"input_ids": [one + 1 for one in text.encode()[:longest]], "labels": label})
    return [one for i, one in enumerate(samples) if i % 8], samples[::8]


def collate(samples):
    longest = max(len(one["input_ids"]) for one in samples)
    ids = torch.tensor([one["input_ids"] + [0] * (longest - len(one["input_ids"])) for one in samples])
    labels = torch.tensor([one["labels"] for one in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="/usr/share/games/fortunes", help="folder with a file for each topic")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/fortune-topics", help="folder for the weights")
    options = parser.parse_args()

    set_seed(0)
    config = BertConfig(vocab_size=257, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=96, max_position_embeddings=128, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, num_labels=len(TOPICS))
    train, unseen = read_samples(options.data)
    arguments = TrainingArguments(
        options.out, per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch, max_steps=options.steps, learning_rate=1e-3,
        warmup_steps=options.steps // 10, logging_steps=10, save_strategy="no", report_to=[], use_cpu=True)
    model = BertForSequenceClassification(config)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=train, eval_dataset=unseen, memory="1GiB")
    trainer.train()
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f} over {len(unseen)} texts")
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()
