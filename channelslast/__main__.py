"The command line: which part of the command runs, with what it was given."
import sys

from fastcore.script import anno_parser

from .command.common import UsageError


def _spelled(option, usage) -> str:
    "An option with a dash, as fastcore before 2.0 wrote it: with an underscore."
    name, eq, value = option.partition('=')
    other = '--' + name[2:].replace('-', '_')
    return other + eq + value if name.startswith('--') and name not in usage and other in usage else option


def cli():
    "Entry point of the command `channelslast`."
    if sys.argv[1:2] == ['bench']:
        from .command.bench import main
        del sys.argv[1]
    else: from .command.demo import main
    parser = anno_parser(main, prog='channelslast')
    usage = parser.format_usage()
    sys.argv[1:] = [_spelled(o, usage) for o in sys.argv[1:]]
    args = vars(parser.parse_args())
    args.pop('pdb', None), args.pop('xtra', None)
    try: main(**args)
    except UsageError as e:
        print(f'channelslast: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': cli()
