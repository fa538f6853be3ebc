//! The `mainstay` binary: parses the command line, runs one command, and turns its outcome into an exit code.

mod args;
mod commands;
mod data;
mod failure;
mod local;
mod memory;
mod output;
mod rows;
mod serve;
mod settings;
mod takeover;
mod transfer;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::settings::{LogFormat, LogSettings};

#[cfg(all(feature = "jemalloc", not(target_env = "msvc")))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Makes the mistake that the environment names.
#[cfg(feature = "planted")]
fn plant() {
    if let Ok(name) = std::env::var("MAINSTAY_PLANTED") {
        match name.parse() {
            Ok(bug) => mainstay_protocol::planted::plant(Some(bug)),
            Err(error) => eprintln!("mainstay: {error}"),
        }
    }
}

fn main() -> ExitCode {
    #[cfg(feature = "planted")]
    plant();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    let output = Output::new(args.json());
    logging(&args);
    // A server has two threads for each core: where a task takes a millisecond, as the fold of a large batch does, the system lets others go
    // on beside it.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // Reads of the store run there; the disk gains nothing from more.
        .max_blocking_threads(64)
        .worker_threads(if matches!(args.command, Command::Serve(_)) { 2 * cores } else { cores })
        .build()
        .map_err(|error| Failure::failed("INTERNAL", format!("cannot start: {error}")))
        .and_then(|runtime| {
            let outcome = runtime.block_on(run(args.command, output));
            // A read of standard input may be blocked for ever; it holds nothing that matters.
            runtime.shutdown_background();
            outcome
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // As a process that the signal of a broken pipe ends: without a word.
        Err(failure) if failure.is_unread() => failure.exit.into(),
        Err(failure) => {
            output.failure(&failure);
            failure.exit.into()
        }
    }
}

/// Answers arguments that cannot be parsed, and those that ask for help.
fn usage(error: &clap::Error) -> ExitCode {
    // Nothing was parsed that could say so.
    let json = std::env::args_os().any(|arg| arg == "--json");
    if error.use_stderr() && json {
        let failure = Failure::usage(error.to_string().trim_end());
        Output::new(true).failure(&failure);
        return failure.exit.into();
    }
    // Standard output may be gone; then there is nobody to help.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage.into() } else { ExitCode::SUCCESS }
}

/// Logs go to standard error; `MAINSTAY_LOG` sets what is logged, for a server also its settings.
fn logging(args: &Args) {
    let (default, log) = match &args.command {
        // What is wrong with the settings is told by the command.
        Command::Serve(args) => ("info", serve::layers(args).read(std::env::vars()).unwrap_or_default().log),
        _ => ("error", LogSettings::default()),
    };
    let given = std::env::var("MAINSTAY_LOG").ok().filter(|filter| !filter.is_empty());
    let filter = given.as_deref().or(log.filter.as_deref()).unwrap_or(default);
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_else(|error| {
        // One of the settings is refused by the command.
        if given.is_some() {
            eprintln!("mainstay: MAINSTAY_LOG={filter} is not a filter ({error}); logging `{default}`");
        }
        tracing_subscriber::EnvFilter::new(default)
    });
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    match log.format {
        Some(LogFormat::Json) => logs.json().flatten_event(true).init(),
        _ => logs.init(),
    }
}

async fn run(command: Command, output: Output) -> Result<(), Failure> {
    match command {
        Command::Serve(args) => serve::run(args, output).await,
        Command::Demo(args) => interruptible(commands::demo::run(args, output)).await,
        Command::DemoAgent(args) => commands::demo::agent(args).await,
        Command::Append(args) => commands::append::run(args, output).await,
        Command::Tail(args) => commands::tail::run(args, output).await,
        Command::Presence(args) => commands::presence::run(args, output).await,
        Command::Join(args) => commands::presence::join(args, output).await,
        Command::Run(args) => commands::run::run(args, output).await,
        Command::Notify(args) => commands::notify::run(args, output).await,
        Command::Signal(args) => commands::signal::run(args, output).await,
        Command::State(args) => commands::state::run(args, output).await,
        Command::Session(args) => commands::session::run(args, output).await,
        Command::Token(args) => commands::token::run(args, output).await,
        Command::Doctor(args) => interruptible(commands::doctor::run(args, output)).await,
        Command::Top(args) => commands::top::run(args, output).await,
        Command::Verify(args) if args.online => interruptible(commands::online::run(args, output)).await,
        Command::Verify(args) => commands::verify::run(&args, output),
        Command::Backup(args) => commands::backup::backup(args, output).await,
        Command::Restore(args) => commands::backup::restore(args, output).await,
        Command::Bench(args) => interruptible(commands::bench::run(args, output)).await,
        Command::Completions(args) => commands::manual::completions(&args),
        Command::Man(args) => commands::manual::man(&args),
    }
}

/// Ends a command at Ctrl-C or SIGTERM, and with it the processes and temporary files that it made.
async fn interruptible(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::select! {
        result = command => result,
        () = serve::signalled() => Err(Failure::failed("INTERRUPTED", "interrupted")),
    }
}
