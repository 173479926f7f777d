"""support/instruct.py -- questions and answers about transcripts by an OpenAI-compatible server."""
import asyncio
import json
import os
import random
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path
from tqdm import tqdm
from data import read_manifest
from model import ASR_PROMPT
from support import cli
from support.rows import BadRow, BadRows, check_text

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
KINDS, RUN = TABLES["kinds"], 5  # so many words of a transcript in a row give it away

def words(text: str) -> str:  # " of a text ", so that "in" finds words that follow one another
    return " ".join(["", *re.findall(r"\w+", text.lower().replace("ё", "е")), ""])

def language(text: str) -> str:  # of most letters, "ru", "en" or "other"; "" without any
    letters = Counter(m.lastgroup for m in re.finditer(TABLES["letters"], text.lower()))
    return max(letters, key=letters.get, default="")

def make_jobs(args) -> dict[str, tuple]:
    """{digest of all that an answer depends on: (sample, kind, request)}, audio relative to OUT."""
    bad, jobs, folder = BadRows(), {}, os.path.realpath(Path(args.out).parent)
    samples, total = read_manifest(args.manifest, bad)
    for sample in samples:
        text, lang = sample.answer, language(sample.answer)
        kinds = [kind for kind in args.kinds if lang in KINDS[kind]]
        if sample.question != ASR_PROMPT or not all(map(os.path.isfile, sample.audio)):
            bad.add("no transcript, or missing file", sample.name)
        elif not kinds:
            bad.add("no kind of question for its language", sample.name)
        else:
            sample.audio = [os.path.relpath(os.path.abspath(a), folder) for a in sample.audio]
            rng = random.Random(f"{args.seed} {sample.audio} {text}")
            for kind in rng.choices(kinds, k=args.per_row):
                prompt = "\n\n".join([TABLES[lang]["prompt"], KINDS[kind][lang], text])
                messages = [dict(role="user", content=prompt)]
                request = TABLES["request"] | dict(model=args.model, messages=messages)
                jobs[cli.digest(request, sample.audio, rng.random())] = sample, kind, request
    bad.report(total, args.manifest)
    return jobs

def check(content: str, sample, name: str, seen: set) -> dict:
    """What the server said -> a row for training, or BadRow. seen: questions accepted so far."""
    content = re.sub(r"^[^{]*|[\x00-\x1f]", " ", content[:content.rfind("}") + 1])
    try:
        reply = json.loads(content)  # without control characters, which vLLM may leave in strings
    except ValueError:
        raise BadRow("broken JSON") from None
    question, answer = (" ".join(check_text(reply.get(k), recordings=0).split())
                        for k in ("question", "answer"))
    said, asked, told = words(sample.answer), words(question), words(answer)
    kind, found, lang = KINDS[name], KINDS[name]["found"], language(sample.answer)
    runs = rf"(?=( (?:\w+ ){{{min(RUN, len(said.split()))}}}))"  # of words, one from each word on
    reasons = {
        "length": not 6 < len(asked) < 203 or len(told) > min(kind["max"], kind["per"] * len(said)),
        "question in another language": language(question) != lang,
        "answer in another language": language(answer) not in kind.get("answer_in", ["", lang]),
        "answer is not said": found == "yes" and told not in said,
        "answer is said": found == "no" and {*told.split()} - {*TABLES["stop"]} & {*said.split()},
        "question tells what is said": any(run in asked for run in re.findall(runs, said)),
        "question tells the answer": told in asked,
        "mentions a transcript": re.search(TABLES["mentions"], asked + told),
        "duplicate": (*sample.audio, asked) in seen}
    for reason in filter(reasons.get, reasons):
        raise BadRow(reason)
    seen.add((*sample.audio, asked))
    return dict(audio=sample.audio[0] if len(sample.audio) == 1 else sample.audio, kind=name,
                question=question, answer=TABLES[lang]["refusal"] if found == "no" else answer)

async def ask(jobs: dict, args, answers: dict, part: Path, counts: Counter) -> None:
    """Adds what the server says to `answers` and `part`, and failed requests to `counts`."""
    with cli.as_user_error("pip install -r support/requirements-page.txt: ", ImportError):
        import openai
    secret = os.environ.get("OPENAI_API_KEY") or "none"  # where one is needed, servers say so
    client = openai.AsyncOpenAI(
        base_url=args.url, api_key=secret, timeout=args.timeout, max_retries=args.retries)
    part.parent.mkdir(parents=True, exist_ok=True)
    left, tokens = [key for key in jobs if key not in answers], Counter()
    bar = tqdm(total=len(left), unit=" answers", mininterval=0.1 if sys.stderr.isatty() else 10)
    async def work(queue):
        for key in queue:
            try:
                reply = await client.chat.completions.create(**jobs[key][-1])
                answers[key] = reply.choices[0].message.content or ""
                with part.open("a", encoding="utf-8") as file:
                    file.write(f"\n{json.dumps([key, answers[key]])}\n")
                tokens.update({name: getattr(reply.usage, name, 0) for name in TABLES["tokens"]})
            except (openai.APIError, AttributeError, LookupError, TypeError, ValueError) as e:
                counts[f"failed: {type(e).__name__}"] += 1
                if why := TABLES["fatal"].get(type(e).__name__):
                    raise cli.UserError(f"{args.url} {why}") from None
            bar.set_postfix(tokens | counts, refresh=False)
            bar.update()
    with bar:
        await asyncio.gather(*map(work, [iter(left)] * args.concurrency))  # all from one queue

def main() -> None:
    args = cli.ArgumentParser().add_tables("instruct").parse_args()
    rows, seen, counts = [], set(), Counter()
    out, part = Path(args.out), Path(f"{args.out}.part")  # what was said; repeat to go on from it
    if out.exists() and not part.exists():
        raise cli.UserError(f"{out} is finished: delete it, or choose another --out")
    cli.check_out(out.parent)
    jobs, before = make_jobs(args), part.read_text(encoding="utf-8") if part.exists() else ""
    answers = dict(map(json.loads, re.findall(r'^\[.*[^\\]"\]$', before, re.M)))  # of whole lines
    asyncio.run(ask(jobs, args, answers, part, counts))
    for key in [key for key in jobs if key in answers]:
        try:
            rows.append(check(answers[key], *jobs[key][:2], seen))
        except BadRow as e:
            counts[f"refused: {e}"] += 1
    for reason, n in [("usable", len(rows)), *counts.most_common()]:
        print(f"{n:8} {reason}", file=sys.stderr)
    if rows:
        cli.write_text(out, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    if not rows or jobs.keys() - answers.keys():
        raise cli.UserError("requests failed, or no answer is usable: see above; repeat to go on")
    part.unlink()

cli.run(main, __name__)
