"""Chat with a tuned model in the terminal: `python -m dpo_runner.chat RUN_DIR`."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.streams import put, silenced

Message = dict[str, str]

_ADVICE = "if a training run holds the GPU, set CUDA_VISIBLE_DEVICES= in the environment to answer on the CPU"

HELP = "/reset forgets the conversation, /quit ends it"


class Chat:
    """A conversation with the model of a finished run.

    Args:
        run_dir: the run's directory.
        max_new_tokens: an answer's length limit in tokens.
        temperature: 0 answers greedily, above 0 samples.
        system: a system prompt; None for the one used in training (`data.system_prompt`), if any.

    Raises:
        ConfigError: `run_dir` does not hold a finished run.
    """

    def __init__(self, run_dir: Path, max_new_tokens: int, temperature: float = 0.0, system: str | None = None) -> None:
        from dpo_runner.model.result import load_tuned_model
        from dpo_runner.records.reading import check_finished, read_run_conf
        from dpo_runner.training.memory.device import LOADING, watch_memory

        check_finished(run_dir)
        from dpo_runner.data.templates.chat_template import ChatTemplate

        with watch_memory(LOADING, advice=_ADVICE):
            self.model, self.tokenizer = load_tuned_model(run_dir)
        trained = read_run_conf(run_dir).data
        system = system if system is not None else trained.system_prompt
        self._template = ChatTemplate(self.tokenizer, None, trained.on_no_system_role)
        self._max_new_tokens, self._temperature, self._system = max_new_tokens, temperature, system
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, text: str, show: Callable[[str], None]) -> str:
        """Add a user turn, stream the answer to `show`, and return the whole answer after adding it."""
        self.messages.append({"role": "user", "content": text})
        answer = self._answer(self.messages, show)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def compare(self, text: str) -> tuple[str, str]:
        """Return the untuned and the tuned model's answers to one question, outside the conversation."""
        messages = [
            *(message for message in self.messages if message["role"] == "system"),
            {"role": "user", "content": text},
        ]
        from dpo_runner.model.result import untuned

        with untuned(self.model):
            before = self._answer(messages, lambda piece: None)
        return before, self._answer(messages, lambda piece: None)

    def _answer(self, messages: list[Message], show: Callable[[str], None]) -> str:
        import torch
        from transformers import TextIteratorStreamer

        from dpo_runner.model.tokenizer import ONE_ANSWER, find_stop_ids
        from dpo_runner.training.memory.device import ANSWERING, watch_memory

        input_ids = torch.tensor([self._template.render_prompt(messages)], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self._temperature > 0:
            sampling = {"do_sample": True, "temperature": self._temperature}
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                self.model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=self._max_new_tokens,
                    eos_token_id=find_stop_ids(self.model, self.tokenizer, self._template.end_of_turn),
                    pad_token_id=self.tokenizer.pad_token_id,
                    streamer=streamer,
                    **ONE_ANSWER | sampling,
                )
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            show(piece)
        thread.join()
        with watch_memory(ANSWERING, advice=_ADVICE):
            if failure:
                raise failure[0]
        return "".join(pieces).strip()


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 invalid run directory or argument, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.chat", description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="a finished run's directory")
    parser.add_argument("--prompt", help="answer this once, and end")
    parser.add_argument("--compare", action="store_true", help="show the untuned and the tuned answer side by side")
    parser.add_argument("--system", help="a system prompt (default: the one of training, if any)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="an answer's length limit (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) answers greedily")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature {args.temperature}: must be a number from 0 on")
    with honest_exit("interrupted"):
        _talk(args)


def _talk(args: argparse.Namespace) -> None:
    from rich.markup import escape

    from dpo_runner.io.console import FoldingTable, open_terminal, visible
    from dpo_runner.io.logs import route_library_logs

    with route_library_logs(None):
        chat = Chat(args.run_dir, args.max_new_tokens, args.temperature, args.system)
        console = open_terminal(soft_wrap=True)

        def reply(text: str) -> None:
            if args.compare:
                before, after = chat.compare(text)
                table = FoldingTable("untuned", "tuned", expand=True)
                table.add_row(escape(visible(before)), escape(visible(after)))
                console.print(table)
                return
            chat.ask(text, lambda piece: put(visible(piece), end=""))
            put("")

        if args.prompt is not None:
            reply(args.prompt)
            return
        console.print(f"[dim]{HELP}[/]")
        while 1 not in silenced:
            try:
                text = input("you> ").strip()
            except (EOFError, OSError):
                put("")
                return
            if text == "/quit":
                return
            if text == "/reset":
                chat.reset()
                console.print("[dim]forgotten[/]")
            elif text.startswith("/"):
                console.print(f"[dim]no such command; {HELP}[/]")
            elif text:
                reply(text)


if __name__ == "__main__":
    main()
