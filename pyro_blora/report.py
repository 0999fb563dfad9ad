"""stub"""


def write_report(folder, name=None):
    pass
