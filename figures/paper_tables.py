FIGURES = {}


def main_table(out):
    return ""
