"The command line: runs the demo or, with `bench`, the benchmark."
import sys

from fastcore.script import anno_parser

from .command.common import UsageError


def _with_underscores(option, usage) -> str:
    "Replace the dashes in an option's name if `usage` has it with underscores only, as fastcore before 2.0 does."
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
    sys.argv[1:] = [_with_underscores(o, usage) for o in sys.argv[1:]]
    args = {k: v for k, v in vars(parser.parse_args()).items() if k not in ('pdb', 'xtra')}
    try: main(**args)
    except UsageError as e:
        print(f'channelslast: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': cli()
