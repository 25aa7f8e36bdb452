"""The documentation against the code: links, tests that are named, messages, generated pages, commands."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "configs" / "README.md"])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_tests_exist(page):
    for file, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_and_targets_of_commands_exist(page):
    """Scripts, configs and make targets of every command line."""
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for line in commands(page):
        for word in shlex.split(line, comments=True):
            if re.fullmatch(r"(scripts|configs|tests)/[\w./-]+\.(py|yaml|json)", word):
                assert (ROOT / word).is_file(), line
        match = re.match(r"make ([\w-]+)", line)
        assert not match or match[1] in targets, line


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_of_commands_exist(page):
    """Every option given to one of our scripts is one that the script defines, itself or through its dataclasses."""
    for line in commands(page):
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if re.fullmatch(r"scripts/\w+\.py", word)]
        if not scripts:
            continue
        known = options_of(scripts[0])
        for word in words[words.index(scripts[0]) + 1 :]:
            if word.startswith("--"):
                assert word.split("=")[0] in known, line


def commands(page: Path) -> list[str]:
    """Lines of the page's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def options_of(script: str) -> set[str]:
    """What the script's --help lists."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        written = []
        patch.setattr("sys.argv", [script, "--help"])
        patch.setattr("sys.stdout", type("Out", (), {"write": written.append, "flush": lambda: None}))
        module.main()
    return set(re.findall(r"--[\w-]+", "".join(written)))


def test_messages_of_the_troubleshooting_page_are_said():
    """Each quoted message occurs in the code, split over lines and f-strings as it may be there."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "moba_hf").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`", page, re.M)
    assert len(messages) > 10
    for message in messages:
        assert message in joined, message


def test_configuration_reference_is_not_stale():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "write_configuration_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text(encoding="utf-8") == module.reference()


def test_configs_are_listed():
    page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    for file in sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file()):
        name = str(file.relative_to(ROOT / "configs"))
        assert name == "README.md" or f"`{name}`" in page, name
