#!/usr/bin/env python3
"""Writes the tensors that decode_npy reads: one decode step of DeepSeek's shape.

    python3 examples/make_npy.py DIR [--keys 32768] [--selected 2048] [--block-size 64] ...

Queries lean towards one topic and keys carry some of it, so that a softmax is neither flat nor
one-hot; a cheap guess at the scores, as an indexer makes it, picks the keys to read.
"""

import argparse
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

DK, ROPE = 512, 64


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1, help="query rows of a sequence (default 1)")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--selected", type=int, default=2048, help="0: no list, all keys")
    parser.add_argument("--block-size", type=int, default=0, help="cut the cache into pages of so "
                        "many tokens, in random order (default: contiguous)")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.selected > args.keys:
        parser.error(f"--selected {args.selected} of --keys {args.keys}")
    return args


def make(args):
    """query (B, S1, N1, 576), key (B, S2, 1, 576), sparse_indices (B, S1, 1, K) or None."""
    rng = np.random.default_rng(args.seed)
    topic = rng.standard_normal((args.batch, 1, 1, DK + ROPE), np.float32)
    lean = 0.05 + 0.02 * rng.standard_normal((args.batch, args.rows, args.heads, 1), np.float32)
    about = rng.standard_normal((args.batch, args.keys, 1, 1), np.float32)
    query = lean * topic + rng.standard_normal((*lean.shape[:3], DK + ROPE), np.float32)
    key = about * topic + rng.standard_normal((*about.shape[:3], DK + ROPE), np.float32)
    if args.selected == 0:
        return query, key, None
    guess = about[:, None, :, 0, 0] + 0.3 * rng.standard_normal(
        (args.batch, args.rows, args.keys), np.float32)
    best = np.argsort(-guess, axis=-1, kind="stable")[..., :args.selected]
    return query, key, best[:, :, None, :].astype(np.int32)


def into_pages(key, block_size, rng):
    """The pool of pages, its block_table and the lengths of a paged cache."""
    batch, keys = key.shape[:2]
    pages = -(-keys // block_size)
    table = rng.permutation(batch * pages).astype(np.int32).reshape(batch, pages)
    padded = np.zeros((batch, pages * block_size, *key.shape[2:]), key.dtype)
    padded[:, :keys] = key
    pool = np.empty((batch * pages, block_size, *key.shape[2:]), key.dtype)
    pool[table.ravel()] = padded.reshape(pool.shape)
    return pool, table, np.full(batch, keys, np.int32)


def main():
    args = arguments()
    query, key, indices = make(args)
    tensors = {"sparse_indices": indices, "block_table": None, "actual_seq_lengths_kv": None}
    if args.block_size > 0:
        key, tensors["block_table"], tensors["actual_seq_lengths_kv"] = into_pages(
            key, args.block_size, np.random.default_rng(args.seed))
    dtype = ml_dtypes.bfloat16 if args.dtype == "bf16" else np.float32
    for name, x in (("query", query), ("key", key)):
        tensors[name] = x[..., :DK].astype(dtype)
        tensors[f"{name}_rope"] = x[..., DK:].astype(dtype)

    args.dir.mkdir(parents=True, exist_ok=True)
    for name, x in sorted(tensors.items()):
        path = args.dir / f"{name}.npy"
        if x is None:  # an optional one of an earlier call would be read
            path.unlink(missing_ok=True)
            continue
        np.save(path, x)
        print(f"{path}  {x.dtype} {x.shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
