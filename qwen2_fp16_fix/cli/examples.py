"""The end of each command's help: examples, what its exit codes mean, and where to read on."""

#: There is no other public address yet.
LINK = "https://pypi.org/project/qwen2-fp16-fix/"

EXAMPLES = {
    "": ("doctor", "scan Qwen/Qwen2.5-7B-Instruct", "run -- python eval.py"),
    "demo": ("demo", "demo --save demo-checkpoint"),
    "certify": ("certify Qwen/Qwen2.5-7B-Instruct", "certify ./checkpoint --details -o certificate.json"),
    "verify": ("verify Qwen/Qwen2.5-1.5B-Instruct --max-kl 1e-4", "verify ./checkpoint --text my.txt -o verified.json"),
    "export": ("export ./checkpoint ./exported", "export Qwen/Qwen2.5-7B-Instruct ./exported --code-only"),
    "push": ("push ./exported me/my-model --dry-run", "push ./exported me/my-model --public"),
    "doctor": ("doctor", "doctor Qwen/Qwen2.5-7B-Instruct", "doctor ./checkpoint --details"),
    "scan": ("scan Qwen/Qwen2.5-7B-Instruct", "scan ./checkpoint --prompts my.txt --report scan.html"),
    "run": ("run -- python eval.py --batch 8", "run -- lm_eval --model hf", "run -- -m my_package"),
    "status": ("status", "status --json"),
    "lock": ("lock", "lock -o qwen2-fp16-fix.lock"),
    "check": ("check qwen2-fp16-fix.lock", "check exported/qwen2_fp16_fix.lock --folder exported"),
}

#: What 0 and 1 mean. A command without a 1 does what it is asked to, or fails.
CODES = {
    "": "0 good, 1 a finding",
    "demo": "0 stock float16 fails and the fix works, 1 otherwise",
    "certify": "0 proven, 1 not proven",
    "verify": "0 verified, 1 not verified",
    "export": "0 exported",
    "push": "0 pushed",
    "doctor": "0 ready, 1 something is wrong here",
    "scan": "0 every number is finite, 1 float16 overflows",
    "run": "that of the program; before it starts",
    "status": "0 supported",
    "lock": "0 locked",
    "check": "0 as locked, 1 something has changed",
}
#: The commands that may ask the Hub.
ONLINE = {"", "certify", "verify", "export", "push", "doctor", "scan"}


def epilog(command: str) -> str:
    """The end of a command's help; of the program's for an empty name. Examples have at most 78 columns."""
    examples = "\n".join(f"  qwen2-fp16-fix {example}" for example in EXAMPLES[command])
    codes = [CODES[command], "2 wrong usage or input", "3 unsupported"]
    codes += ["4 no network or a Hub error"] if command in ONLINE else []
    return f"Examples:\n{examples}\n\nExit codes: {', '.join(codes)}.\n\nMore: {LINK}"
