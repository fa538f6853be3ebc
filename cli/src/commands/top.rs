//! `top`: what the server of this machine is doing.

use core::time::Duration;
use std::fmt::Write as _;
use std::io::IsTerminal;

use serde_json::{Value, json};

use crate::args;
use crate::data::Data;
use crate::failure::{Exit, Failure};
use crate::output::{Output, plain};
use crate::serve::questions::{self, Question};
use crate::serve::signalled;

pub(crate) async fn run(args: args::Top, output: Output) -> Result<(), Failure> {
    let data = Data::new(args.data.as_deref())?;
    let pause = Duration::from_secs_f64(args.every);
    let redraws = std::io::stdout().is_terminal() && !args.once;
    let mut before: Option<Value> = None;
    loop {
        let (path, rows) = (data.socket(), args.rows);
        let asked = tokio::task::spawn_blocking(move || questions::ask(&path, Question::Status(rows))).await;
        let asked = asked.map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
        let Some(mut now) = asked? else {
            return Err(Failure {
                exit: Exit::Unreachable,
                code: "UNREACHABLE".into(),
                message: format!(
                    "no server serves {}; start one, or name its directory with --data",
                    data.dir().display()
                ),
                retryable: true,
            });
        };
        if let Some(object) = now.as_object_mut() {
            object.insert("event".into(), json!("status"));
        }
        output.event(&now, || {
            let clear = if redraws { "\x1b[H\x1b[2J" } else { "" };
            format!("{clear}{}", page(&now, before.as_ref()).trim_end())
        })?;
        if args.once {
            return Ok(());
        }
        before = Some(now);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = signalled() => return Ok(()),
        }
    }
}

const LEVELS: [&str; 6] = [
    "nothing is shed",
    "new connections are shed",
    "new connections and sessions are shed",
    "new connections, sessions and history are shed",
    "everything but appends, live deliveries and signals is shed",
    "everything but live deliveries and signals is shed",
];

fn page(now: &Value, before: Option<&Value>) -> String {
    let mut text = String::new();
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let status = &now["status"];
    let load = usize::try_from(number(&status["load"])).unwrap_or(0);
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "mainstay {}, up {} s, {} connections; {}",
        word(&now["version"]),
        number(&now["uptime_s"]),
        number(&status["connections_total"]),
        LEVELS.get(load).copied().unwrap_or("-")
    );
    let mebi = |value: &Value| value.as_u64().map_or("-".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
    let memory = &now["memory"];
    let _ = writeln!(
        text,
        "memory {} handed out, {} held, load is shed before {}",
        mebi(&memory["allocated"]),
        mebi(&memory["resident"]),
        mebi(&memory["bound"])
    );
    for store in now["stores"].as_array().into_iter().flatten() {
        if store["health"] != "serving" {
            let _ =
                writeln!(text, "store of {}: {} {}", word(&store["namespace"]), word(&store["health"]), store["what"]);
        }
    }
    for namespace in status["namespaces"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "\nnamespace {}: {} sessions in memory, {} subjects",
            word(&namespace["name"]),
            number(&namespace["sessions_total"]),
            number(&namespace["subjects"]),
        );
        let refused = namespace["refused"].as_object().into_iter().flatten();
        let refused: Vec<String> = refused.map(|(limit, count)| format!("{limit} {}", number(count))).collect();
        if !refused.is_empty() {
            let _ = writeln!(text, "refused or served later since the start: {}", refused.join(", "));
        }
        let _ = writeln!(text, "{:<40} {:>12} {:>10} {:>6} {:>6}", "session", "tail", "new", "users", "follow");
        for session in namespace["sessions"].as_array().into_iter().flatten() {
            let _ = writeln!(
                text,
                "{:<40} {:>12} {:>10} {:>6} {:>6}",
                cut(&word(&session["name"]), 40),
                number(&session["tail"]),
                grown(session, namespace, before).map_or("-".to_owned(), |new| format!("+{new}")),
                number(&session["users"]),
                number(&session["subscriptions"])
            );
        }
    }
    let _ = writeln!(
        text,
        "\n{:<22} {:<24} {:>9} {:>6} {:>8}  slowest subscription",
        "connection", "subject", "rtt", "moves", "lag"
    );
    for connection in status["connections"].as_array().into_iter().flatten() {
        let slowest =
            connection["subscriptions"].as_array().into_iter().flatten().max_by_key(|one| number(&one["lag"]));
        let (lag, what) = match slowest {
            Some(one) => (
                number(&one["lag"]),
                format!("{}: {} for {} s", word(&one["session"]), word(&one["doing"]), number(&one["for_ms"]) / 1000),
            ),
            None => (0, "follows nothing".to_owned()),
        };
        let rtt = connection["rtt_ms"].as_f64().unwrap_or(0.0);
        let _ = writeln!(
            text,
            "{:<22} {:<24} {rtt:>6.1} ms {:>6} {lag:>8}  {what}",
            cut(&word(&connection["remote"]), 22),
            cut(connection["subject"].as_str().unwrap_or("(no token)"), 24),
            number(&connection["path_changes"])
        );
    }
    text
}

/// How many records came since the look before.
fn grown(session: &Value, namespace: &Value, before: Option<&Value>) -> Option<u64> {
    let namespaces = before?["status"]["namespaces"].as_array()?;
    let then = namespaces.iter().find(|other| other["name"] == namespace["name"])?["sessions"].as_array()?;
    let then = then.iter().find(|other| other["name"] == session["name"])?["tail"].as_u64()?;
    session["tail"].as_u64()?.checked_sub(then)
}

/// At most so many characters of what somebody else wrote.
fn cut(text: &str, most: usize) -> String {
    plain(text).chars().take(most).collect()
}
