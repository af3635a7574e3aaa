"""Make the packaged emoji images, `emoji-mini`: one style a split, with coarse and fine classes, in Parquet.

The pictures and Unicode's groups and subgroups come from packages of the npm registry, of fixed version and SHA-256:
see `STYLES` and `LABELS`. docs/emoji.md says what the data set is for and which emoji are left out.

    pip install resvg-py==0.5.0        # npm is needed as well, as of Node.js
    python examples/make_emoji_images.py --packages runs/emoji-packages
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

OUT = Path(__file__).parents[1] / "src/diffusion_sae/zoo/emoji"
SHEET = Path(__file__).parents[1] / "docs/emoji.png"
SHEET_COLUMNS = 3  # a group
SIZE, COLOURS = 64, 32
MIN_EMOJI = 6
# men and women of whom there is a person as well: in one style they are the same figure once more
SEX = re.compile(r".*200D-264[02]|1F46[89]-200D-.*")
VARIATION = "FE0F"  # a code point that asks for the coloured picture; sets name their icons with or without it


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str

    def fetch(self, folder: Path) -> "tarfile.TarFile":
        """The package's archive, downloaded once."""
        path = folder / f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        if not path.exists():
            npm = shutil.which("npm")
            if npm is None:
                sys.exit("npm is missing: install Node.js with npm, for instance the packages nodejs and npm.")
            subprocess.run([npm, "pack", "--silent", f"{self.name}@{self.version}"], cwd=folder, check=True)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            sys.exit(f"{path} has the SHA-256 {found}, expected is {self.sha256}. Delete it and try again.")
        return tarfile.open(path)


LABELS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
STYLES = {
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
}
SPLITS = {"train": ("twemoji", "noto"), "validation": ("emojione",), "test": ("fluent",)}


@dataclass(frozen=True)
class Emoji:
    code_points: str
    character: str
    name: str
    group: str
    subgroup: str


@dataclass
class IconSet:
    """A style: its SVG pictures by icon name, and where the package has them the names by code points."""

    content: dict[str, Any]
    names: dict[str, str]
    aliases: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        aliases = self.content.get("aliases", {})
        # other aliases are turned or mirrored pictures
        self.aliases = {name: alias["parent"] for name, alias in aliases.items() if set(alias) == {"parent"}}

    @classmethod
    def read(cls, package: Package, folder: Path) -> "IconSet":
        with package.fetch(folder) as archive:
            names = read_json(archive, "chars.json")
            return cls(read_json(archive, "icons.json"), {plain(code): name for code, name in names.items()})

    def svg(self, name: str) -> str | None:
        icons = self.content["icons"]
        icon = icons.get(name) or icons.get(self.aliases.get(name))
        if icon is None:
            return None
        box = [icon.get(key, self.content.get(key, default)) for key, default in BOX.items()]
        links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {links} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'


BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(f"package/{name}")
    assert file is not None, name
    return json.load(file)


def plain(code_points: str) -> str:
    return "-".join(part.lstrip("0") for part in code_points.upper().split("-") if part != VARIATION)


def read_emoji(folder: Path) -> Iterator[Emoji]:
    """Every emoji but flags and what `SEX` says; skin tones are not entries of their own."""
    with LABELS.fetch(folder) as archive:
        entries, names = read_json(archive, "en/data.json"), read_json(archive, "meta/groups.json")
    for entry in sorted(entries, key=lambda entry: entry.get("order", 0)):
        code = plain(entry["hexcode"])
        if "group" not in entry or SEX.fullmatch(code):
            continue
        group, subgroup = names["groups"][str(entry["group"])], names["subgroups"][str(entry["subgroup"])]
        if group not in ("component", "flags"):
            yield Emoji(code, entry["emoji"], entry["label"], group, subgroup)


def names_of(emoji: Emoji, sets: dict[str, IconSet]) -> list[str]:
    """What the sets call it: sets without code points, such as Emoji One, are looked up by the names of the others."""
    names = list(dict.fromkeys(s.names[emoji.code_points] for s in sets.values() if emoji.code_points in s.names))
    also = defaultdict(list)
    for icons in sets.values():
        for alias, parent in icons.aliases.items():
            also[alias].append(parent)
            also[parent].append(alias)
    return list(dict.fromkeys([*names, *(other for name in names for other in also[name])]))


def pictures_of(style: str, emoji: list[Emoji], sets: dict[str, IconSet]) -> dict[str, bytes]:
    """PNG by code points, without emoji that look the same as another one."""
    icons, found = sets[style], {}
    for one in emoji:
        names = [icons.names[one.code_points]] if one.code_points in icons.names else []
        names = names if icons.names else names_of(one, sets)
        svg = next((svg for name in names if (svg := icons.svg(name)) is not None), None)
        if svg is not None:
            found[one.code_points] = png(svg)
    times = Counter(found.values())
    return {code: drawn for code, drawn in found.items() if times[drawn] == 1}


def kept_subgroups(emoji: list[Emoji], pictures: dict[str, dict[str, bytes]]) -> list[str]:
    """In Unicode's order."""
    counts = {
        style: Counter(one.subgroup for one in emoji if one.code_points in found) for style, found in pictures.items()
    }
    subgroups = dict.fromkeys(one.subgroup for one in emoji)
    for subgroup in subgroups:
        least = min(count[subgroup] for count in counts.values())
        if least < MIN_EMOJI:
            print(f"left out: {subgroup}, of which a style has {least} emoji")
    return [name for name in subgroups if min(count[name] for count in counts.values()) >= MIN_EMOJI]


def png(svg: str) -> bytes:
    """On white; with a palette, which halves the file."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white")
    pixels = PILImage.open(io.BytesIO(drawn)).convert("RGB")
    buffer = io.BytesIO()
    pixels.quantize(COLOURS, dither=PILImage.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def rows_of(split: str, emoji: list[Emoji], pictures: dict[str, dict[str, bytes]]) -> list[dict[str, Any]]:
    """In a fixed order in which the classes are mixed, so that the first rows are a sample of all."""
    rows = [
        {
            "image": {"bytes": pictures[style][one.code_points], "path": f"{style}-{one.code_points.lower()}.png"},
            "group": one.group,
            "subgroup": one.subgroup,
            "style": style,
            "emoji": one.character,
            "name": one.name,
        }
        for style in SPLITS[split]
        for one in emoji
        if one.code_points in pictures[style]
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def contact_sheet(path: Path, emoji: list[Emoji], pictures: dict[str, dict[str, bytes]]) -> None:
    """A style a row, some emoji of different subgroups a group."""
    shown: list[Emoji] = []
    for group in dict.fromkeys(one.group for one in emoji):
        everywhere = [
            one for one in emoji if one.group == group and all(one.code_points in p for p in pictures.values())
        ]
        firsts = list({one.subgroup: one for one in reversed(everywhere)}.values())
        shown += firsts[:: max(1, len(firsts) // SHEET_COLUMNS)][:SHEET_COLUMNS]
    sheet = PILImage.new("RGB", (SIZE * len(shown), SIZE * len(pictures)), "white")
    for row, found in enumerate(pictures.values()):
        for column, one in enumerate(shown):
            drawn = PILImage.open(io.BytesIO(found[one.code_points]))
            sheet.paste(drawn.convert("RGB"), (SIZE * column, SIZE * row))
    sheet.quantize(128, dither=PILImage.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sheet", type=Path, default=SHEET, help="picture of some emoji in all styles")
    parser.add_argument("--packages", type=Path, default=Path("runs/emoji-packages"), help="where archives are kept")
    args = parser.parse_args()
    for folder in (args.out, args.packages):
        folder.mkdir(parents=True, exist_ok=True)
    sets = {style: IconSet.read(package, args.packages) for style, package in STYLES.items()}
    emoji = list(read_emoji(args.packages))
    pictures = {style: pictures_of(style, emoji, sets) for style in STYLES}
    subgroups = kept_subgroups(emoji, pictures)
    emoji = [one for one in emoji if one.subgroup in subgroups]
    features = Features(
        {
            "image": Image(),
            "group": ClassLabel(names=list(dict.fromkeys(one.group for one in emoji))),
            "subgroup": ClassLabel(names=subgroups),
            "style": ClassLabel(names=list(STYLES)),
            "emoji": Value("string"),
            "name": Value("string"),
        }
    )
    for split, styles in SPLITS.items():
        rows = rows_of(split, emoji, pictures)
        table = Dataset.from_list(rows, features=features)
        table.to_parquet(args.out / f"{split}.parquet")
        print(f"{split}: {len(rows)} images in the style of {' and '.join(styles)}")
    contact_sheet(args.sheet, emoji, pictures)


if __name__ == "__main__":
    main()
