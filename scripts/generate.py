"""Continue a prompt with a checkpoint and nothing else: no training config, no Lightning, no Hydra.

    python scripts/generate.py --ckpt outputs/checkpoints/nano_think --prompt "Once upon a time"

On a terminal, each token has the colour of the most trusted expert. Without --prompt or --prompt-file the prompt
is read from standard input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.artifacts.memory import mark_of
from nano_think.engine.sampling import SamplingConfig
from nano_think.engine.session import continue_text, read_prompt, save_continuations
from nano_think.errors import UserError


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="folder of a fused model or of an expert")
    parser.add_argument("--prompt")
    parser.add_argument("--prompt-file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write tokens and routing weights here")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Stream the continuation; raises UserError or ValueError for what cannot be done."""
    config = SamplingConfig(args.temperature, args.top_k, args.top_p, args.seed)
    prompt = read_prompt(args.prompt, args.prompt_file, sys.stdin)
    checkpoint = load_checkpoint(args.ckpt)
    marked = mark_of(checkpoint)
    if marked:
        print(marked, file=sys.stderr)
    made = continue_text(checkpoint, prompt, args.max_new_tokens, config, stream=sys.stdout)
    if args.json is not None:
        save_continuations(args.json, [made], marked)


if __name__ == "__main__":
    try:
        run(arguments())
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
