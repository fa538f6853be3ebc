//! `bench`: load and figures.

use std::time::Duration;

use mainstay_bench::{Options, Report, Spread, Target};

use crate::args::{self, Scenario};
use crate::failure::Failure;
use crate::output::Output;

fn failed(what: String) -> Failure {
    Failure::failed("BENCH", what)
}

/// Refuses settings that the scenario would not heed.
fn check(args: &args::Bench) -> Result<(), Failure> {
    let scenario = args.scenario;
    let open_loop = matches!(scenario, Scenario::Live | Scenario::Fanout) || args.rate.is_some();
    let needs_own = matches!(scenario, Scenario::Idle | Scenario::Reconnect | Scenario::Compact | Scenario::All);
    if args.connect.is_some() && needs_own {
        return Err(Failure::usage(
            "idle, reconnect and compact look into the server's process: they need one of their own, without --connect",
        ));
    }
    if args.connections.is_some() && (open_loop || !matches!(scenario, Scenario::Append | Scenario::Idle)) {
        return Err(Failure::usage(
            "--connections counts for append without --rate and for idle; use --sessions or --subscribers",
        ));
    }
    if args.window.is_some() && scenario != Scenario::Append {
        return Err(Failure::usage("--window counts for append alone"));
    }
    if args.rate.is_some()
        && !matches!(scenario, Scenario::Append | Scenario::Live | Scenario::Fanout | Scenario::Compact)
    {
        return Err(Failure::usage("--rate counts for append, live, fanout and compact"));
    }
    Ok(())
}

pub(crate) async fn run(args: args::Bench, output: Output) -> Result<(), Failure> {
    check(&args)?;
    if cfg!(debug_assertions) {
        eprintln!("mainstay: this is a debug build; its figures mean little");
    }
    let binary = std::env::current_exe().map_err(|error| Failure::io("the path of this program", &error))?;
    mainstay_bench::use_binary(binary);
    let mut spread = Spread::default();
    for run in 1..=args.runs {
        let dir = tempfile::tempdir().map_err(|error| Failure::io("a temporary directory", &error))?;
        spread.add(&mainstay_bench::yardstick::all(dir.path()).await.map_err(failed)?);
        for (scenario, options) in plan(&args) {
            let report = measure(scenario, &options, &args).await?;
            if !output.is_json() {
                eprintln!("run {run} of {}: {}", args.runs, line(&report));
            }
            spread.add(&report);
        }
    }
    if output.is_json() {
        for figure in spread.json() {
            output.json_only(&figure)?;
        }
        return Ok(());
    }
    output.text(&spread.table().to_string())
}

fn line(report: &Report) -> String {
    let figures: Vec<String> = report.figures.iter().map(|f| format!("{} {:.3} {}", f.name, f.value, f.unit)).collect();
    format!("{}: {}", report.scenario, figures.join(", "))
}

/// Every scenario gets a server of its own, so that none inherits another's memory or files.
async fn measure(scenario: Scenario, options: &Options, args: &args::Bench) -> Result<Report, Failure> {
    if scenario == Scenario::Compact {
        return mainstay_bench::compact(options).await.map_err(failed);
    }
    let mut target = match &args.connect {
        Some(path) => Target::Given(path.clone()),
        None => Target::start().await,
    };
    let report = match scenario {
        Scenario::Append => mainstay_bench::append(&target, options).await,
        Scenario::Live => mainstay_bench::live(&target, options).await,
        Scenario::Fanout => mainstay_bench::fanout(&target, options).await,
        Scenario::Replay => mainstay_bench::replay(&target, options).await,
        Scenario::Idle => mainstay_bench::idle(&mut target, options).await,
        Scenario::Start => mainstay_bench::start(&mut target, options).await,
        Scenario::Reconnect | Scenario::Compact | Scenario::All => {
            mainstay_bench::reconnect(&mut target, options).await
        }
    };
    report.map_err(failed)
}

/// The scenarios of this invocation with their settings.
fn plan(args: &args::Bench) -> Vec<(Scenario, Options)> {
    let base = |connections: usize, sessions: usize, window: usize, rate: u64| Options {
        connections: args.connections.unwrap_or(connections),
        sessions: args.sessions.unwrap_or(args.connections.unwrap_or(sessions)),
        window,
        bytes: args.bytes,
        rate: args.rate.unwrap_or(rate),
        subscribers: args.subscribers,
        records: args.records,
        time: Duration::from_secs(args.secs),
        rtt: Duration::from_millis(args.rtt),
    };
    match args.scenario {
        // An open loop is what `live` is.
        Scenario::Append if args.rate.is_some() => vec![(Scenario::Live, base(1, 1, 0, 1))],
        Scenario::Append => vec![(Scenario::Append, base(1, 1, args.window.unwrap_or(16), 0))],
        Scenario::Live => vec![(Scenario::Live, base(50, 50, 0, 20))],
        Scenario::Fanout => vec![(Scenario::Fanout, base(1, 1, 0, 100))],
        Scenario::Replay => vec![(Scenario::Replay, base(1, 1, 0, 0))],
        Scenario::Idle => vec![(Scenario::Idle, base(1000, 0, 0, 0))],
        Scenario::Start => vec![(Scenario::Start, base(8, 8, 0, 0))],
        Scenario::Reconnect => vec![(Scenario::Reconnect, base(1, 1, 0, 0))],
        Scenario::Compact => vec![(Scenario::Compact, base(20, 20, 0, 50))],
        Scenario::All => vec![
            (Scenario::Append, base(1, 1, 512, 0)),
            (Scenario::Append, base(1, 1, 8192, 0)),
            (Scenario::Append, base(100, 100, 16, 0)),
            (Scenario::Append, base(1000, 1000, 4, 0)),
            (Scenario::Append, base(50, 1000, 4, 0)),
            (Scenario::Live, base(50, 50, 0, 20)),
            (Scenario::Fanout, base(1, 1, 0, 100)),
            (Scenario::Replay, base(1, 1, 0, 0)),
            (Scenario::Idle, base(1000, 10_000, 0, 0)),
            (Scenario::Reconnect, base(1, 1, 0, 0)),
            (Scenario::Start, base(8, 8, 0, 0)),
            (Scenario::Compact, base(20, 20, 0, 50)),
        ],
    }
}
