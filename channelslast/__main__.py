"The command line: runs the demo."
from .command.common import run


def cli():
    "Entry point of the command `channelslast`."
    from .command.demo import main
    run(main, 'channelslast')


if __name__ == '__main__': cli()
