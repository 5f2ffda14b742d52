//! The command line: one file a command, each of which parses, calls the library and prints.
//!
//! Data goes to stdout, logs and progress to stderr. Exit codes: 0 ok, 1 failure, 2 usage, 3 damaged data found,
//! 4 fenced or conflict, 5 not found.

mod bench;
mod clone;
mod commit;
mod completions;
mod context;
mod copy;
mod diff;
mod doctor;
mod export;
mod failover;
mod failover_live;
mod gc;
mod hosts;
mod init;
mod key;
mod log;
mod ls;
mod man;
mod mount;
mod output;
mod progress;
mod protect;
mod prune;
mod repair;
mod restore;
mod rm;
mod run;
mod screen;
mod serve_uffd;
mod show;
mod stats;
mod status;
mod tag;
mod umount;
mod verify;
mod warm;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::error::Result;
use crate::platform::memory::share_heaps;
use context::Context;

/// A content-addressed, copy-on-write checkpoint store for virtual machines.
///
/// Every checkpoint is an epoch: an immutable, complete set of a machine's streams (memory, device state, disks).
/// Pages that did not change are stored once, across epochs and machines.
#[derive(Parser)]
#[command(name = "epochfs", version, max_term_width = 100)]
#[command(
    after_help = "Example:\n  epochfs --repo /srv/epochs init\n  epochfs --repo /srv/epochs commit web1 memory=/run/web1/mem.raw vmstate=/run/web1/state\n  epochfs --repo /srv/epochs log web1"
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Args, Clone)]
pub struct Global {
    /// The repository: a directory, or a bucket as s3://BUCKET/PREFIX (gs:// and az:// too). How to reach the service, and
    /// credentials, come from the environment and the usual files.
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "EPOCHFS_REPO",
        value_name = "URL",
        hide_env_values = true
    )]
    repo: Option<String>,
    /// Where this host keeps the page index, what was written to mounts and is not committed, and the daemon's socket.
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "EPOCHFS_STATE_DIR",
        value_name = "DIR",
        hide_env_values = true
    )]
    state_dir: Option<PathBuf>,
    /// How much of what is read from a bucket is kept in the state directory, for the next time; 0 for nothing.
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "EPOCHFS_CACHE_SIZE",
        value_name = "SIZE",
        default_value = "8G",
        value_parser = output::parse_size,
        hide_env_values = true
    )]
    cache_size: u64,
    /// A file with the key of an encrypted repository, one a line; several files, with colons between, for several
    /// repositories. See `epochfs key --help` for other places to keep it.
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "EPOCHFS_KEY_FILE",
        value_name = "FILE",
        value_delimiter = ':',
        value_parser = OsStringValueParser::new().map(PathBuf::from),
        hide_env_values = true
    )]
    key_file: Vec<PathBuf>,
    /// Print one JSON document on stdout instead of text.
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// Neither progress nor notices on stderr.
    #[arg(long, short, global = true, help_heading = "Global options")]
    quiet: bool,
    /// Say more on stderr; twice for even more. EPOCHFS_LOG takes tracing filters.
    #[arg(long, short, global = true, help_heading = "Global options", action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    Init(init::Init),
    Key(key::Key),
    Commit(commit::Commit),
    Log(log::Log),
    Ls(ls::Ls),
    Show(show::Show),
    Diff(diff::Diff),
    Export(export::Export),
    Clone(clone::Clone),
    Copy(copy::Copy),
    Restore(restore::Restore),
    Tag(tag::Tag),
    Rm(rm::Rm),
    Prune(prune::Prune),
    Gc(gc::Gc),
    Run(run::Run),
    Verify(verify::Verify),
    Repair(repair::Repair),
    Warm(warm::Warm),
    Stats(stats::Stats),
    Mount(mount::Mount),
    Umount(umount::Umount),
    Status(status::Status),
    ServeUffd(serve_uffd::ServeUffd),
    Protect(Box<protect::Protect>),
    Hosts(hosts::HostsCommand),
    Failover(failover::Failover),
    Doctor(doctor::Doctor),
    Bench(bench::Bench),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Command {
    fn run(&self, context: &Context) -> Result<ExitCode> {
        match self {
            Self::Init(command) => command.run(context),
            Self::Key(command) => command.run(context),
            Self::Commit(command) => command.run(context),
            Self::Log(command) => command.run(context),
            Self::Ls(command) => command.run(context),
            Self::Show(command) => command.run(context),
            Self::Diff(command) => command.run(context),
            Self::Export(command) => command.run(context),
            Self::Clone(command) => command.run(context),
            Self::Copy(command) => command.run(context),
            Self::Restore(command) => command.run(context),
            Self::Tag(command) => command.run(context),
            Self::Rm(command) => command.run(context),
            Self::Prune(command) => command.run(context),
            Self::Gc(command) => command.run(context),
            Self::Run(command) => command.run(context),
            Self::Verify(command) => command.run(context),
            Self::Repair(command) => command.run(context),
            Self::Warm(command) => command.run(context),
            Self::Stats(command) => command.run(context),
            Self::Mount(command) => command.run(context),
            Self::Umount(command) => command.run(context),
            Self::Status(command) => command.run(context),
            Self::ServeUffd(command) => command.run(context),
            Self::Protect(command) => command.run(context),
            Self::Hosts(command) => command.run(context),
            Self::Failover(command) => command.run(context),
            Self::Doctor(command) => command.run(context),
            Self::Bench(command) => command.run(context),
            Self::Completions(command) => command.run(context),
            Self::Man(command) => command.run(context),
        }
    }
}

/// The whole command line: for completions, manual pages, and the test that every command's help has an example.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    share_heaps();
    run(std::env::args_os())
}

/// Runs a command line.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    // A reader of our output that goes away (`epochfs log | head`) ends us quietly, like other tools.
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            // Nothing is left to do if the terminal is gone.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    output::start_logging(cli.global.verbose, cli.global.quiet);
    tracing::debug!("command begins");
    let context = Context::new(cli.global);
    let result = cli.command.run(&context);
    tracing::debug!("command is done");
    match result {
        Ok(code) => code,
        Err(error) => {
            output::print_error(&error, context.json());
            ExitCode::from(error.exit_code())
        }
    }
}
