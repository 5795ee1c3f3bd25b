"""MMLU's files: its subjects, and the questions of one."""

import csv
from pathlib import Path

from lib.errors import BadInput

CATEGORIES = {  # of MMLU's 57 subjects (hendrycks/test, categories.py)
    "STEM": """abstract_algebra astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""".split(),
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""".split(),
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology
        us_foreign_policy""".split(),
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""".split(),
}
SUBJECTS = sorted(subject for members in CATEGORIES.values() for subject in members)


def read_mmlu(path: Path) -> list[list[str]]:
    """The rows of a file without header: question, four choices, letter.

    Raises ValueError naming file and row.
    """
    if not path.exists():
        raise BadInput(f"{path} is missing; --data must hold dev/ and test/ of MMLU's data.tar")
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]  # a blank line at the end is no row
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}") from None
    if not rows:
        raise BadInput(f"{path} is empty")
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
            columns = f"and has {len(row)} columns, the last {row[-1:]}"
            needed = "must be a question, four choices and A, B, C or D"
            raise BadInput(f"{path}: row {number} {needed}, {columns}")
    return rows
