"""What a level means to each generator.

Only generators whose answers are right, whose verifiers accept every right answer and run no code of a reply, and that
make a puzzle in a fraction of a second: see the README for those left out.
"""

from typing import Any

LEVELS: dict[str, dict[str, dict[str, Any]]] = {
    "easy": {
        "circuit_logic": {"min_terms": 2, "max_terms": 2, "min_inputs": 2, "max_inputs": 2},
        "course_schedule": {"min_num_courses": 4, "max_num_courses": 6},
        "cryptarithm": {"min_words": 2, "max_words": 2},
        "futoshiki": {"min_board_size": 4, "max_board_size": 4, "min_difficulty": 0, "max_difficulty": 1},
        "jugs": {"num_jugs": 4, "difficulty": 4},
        "kakurasu": {"min_rows": 3, "max_rows": 4, "min_cols": 3, "max_cols": 4},
        "knights_knaves": {"n_people": 2, "depth_constraint": 2, "width_constraint": 2},
        "mini_sudoku": {"min_empty": 4, "max_empty": 6},
        "zebra_puzzles": {"num_people": 3, "num_characteristics": 2},
    },
    "normal": {
        "circuit_logic": {"min_terms": 3, "max_terms": 5, "min_inputs": 2, "max_inputs": 4},
        "course_schedule": {"min_num_courses": 8, "max_num_courses": 12},
        "cryptarithm": {"min_words": 3, "max_words": 3},
        "futoshiki": {"min_board_size": 5, "max_board_size": 5, "min_difficulty": 1, "max_difficulty": 2},
        "jugs": {"num_jugs": 3, "difficulty": 8},
        "kakurasu": {"min_rows": 4, "max_rows": 5, "min_cols": 4, "max_cols": 5},
        "knights_knaves": {"n_people": 3, "depth_constraint": 2, "width_constraint": 2},
        "mini_sudoku": {"min_empty": 8, "max_empty": 10},
        "zebra_puzzles": {"num_people": 4, "num_characteristics": 3},
    },
    "hard": {
        "circuit_logic": {"min_terms": 8, "max_terms": 12, "min_inputs": 3, "max_inputs": 6},
        "course_schedule": {
            "min_num_courses": 20,
            "max_num_courses": 30,
            "max_num_prerequisites": 3,
            "min_cycle_length": 4,
            "max_cycle_length": 8,
        },
        "cryptarithm": {"min_words": 4, "max_words": 4},
        "futoshiki": {"min_board_size": 6, "max_board_size": 6, "min_difficulty": 2, "max_difficulty": 3},
        "jugs": {"num_jugs": 3, "difficulty": 12},
        "kakurasu": {"min_rows": 6, "max_rows": 7, "min_cols": 6, "max_cols": 7},
        "knights_knaves": {"n_people": 5, "depth_constraint": 3, "width_constraint": 3},
        "sudoku": {"min_empty": 40, "max_empty": 50},
        "zebra_puzzles": {"num_people": 4, "num_characteristics": 4},
    },
}
