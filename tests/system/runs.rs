//! Runs: an agent that dies is seen, another one goes on at the exact byte, and the first cannot write any more; signals reach who
//! works, whatever else is on the way.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{
    AppendError, Client, ClientError, Code, Config as ClientConfig, Doing, InputPolicy, Intent, Key, Kind, LiveView,
    MessageId, MessageWriter, Payload, Producer, RequestOutcome, Resolution, RunLost, RunMode, Session, Signal,
    SignalOutcome, Start, StatePut, Status, Update,
};
use mainstay_server::Config;
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{MemoryServer, QuicServer};
use mainstay_tests::live::{self, follow};
use mainstay_tests::process::{PATIENCE, Rows, Server, command, events, named, run};
use mainstay_tests::proxy::{Faults, Proxy};
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

/// Prints a number a line, up to so many, with a pause; goes on behind what is there.
const COUNTING: &str = r#"
i=0
if [ -n "$MAINSTAY_PARTIAL" ]; then i=$(tail -n 1 "$MAINSTAY_PARTIAL"); fi
while [ "$i" -lt "$1" ]; do i=$((i+1)); echo "$i"; sleep "$2"; done
"#;

/// What [`COUNTING`] prints in all.
fn counted(count: u32) -> String {
    (1..=count).map(|n| format!("{n}\n")).collect()
}

async fn attach(client: &Client) -> Session {
    live::attach(client, "s1").await
}

/// Folds until a record of this kind came; returns its seq and when it came.
async fn comes(live: &mut LiveView, kind: Kind) -> (u64, Instant) {
    loop {
        let update = timeout(PATIENCE, live.next()).await.unwrap_or_else(|_| panic!("{kind:?} does not come"));
        if let Update::Record(folded) = update.expect("an update").expect("no error")
            && folded.record.kind == kind
        {
            return (folded.seq, Instant::now());
        }
    }
}

/// `mainstay run` of a script.
fn agent(connect: &Path, options: &[&str], script: &str, arguments: &[&str]) -> (Child, Rows) {
    let options = [&["run", "s1", "--json"], options, &["--", "sh", "-c", script, "sh"], arguments].concat();
    let mut child = command(connect, &options).stdout(Stdio::piped()).spawn().expect("start an agent");
    let rows = Rows::of(child.stdout.take().expect("output"));
    (child, rows)
}

async fn kill(child: &Child, signal: &str) {
    let pid = child.id().expect("it runs").to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().await.expect("kill").success());
}

fn code(error: &AppendError) -> Option<Code> {
    match &error.error {
        ClientError::Refused { code, .. } => Some(*code),
        _ => None,
    }
}

fn refused<T: core::fmt::Debug>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Refused { code, .. }) => code,
        other => panic!("not refused: {other:?}"),
    }
}

/// The text of the only message.
fn text(live: &LiveView) -> (String, Status) {
    let messages = live.view().messages();
    let mut all = messages.finished().chain(messages.open());
    let message = all.next().expect("a message");
    assert!(all.next().is_none(), "one message");
    (String::from_utf8_lossy(&message.text).into_owned(), message.status)
}

/// Scenario A7: the agent is killed, or stopped and woken up too late.
async fn takeover(signal: &str) {
    const COUNT: u32 = 60;
    const LEASE: Duration = Duration::from_secs(2);
    let server = Server::start().await;
    let client = server.client(ClientConfig::default());
    let mut live = attach(&client).await.live().await.expect("live");
    let arguments = [&*COUNT.to_string(), "0.05"];
    let (mut first, mut first_rows) = agent(&server.connect_file(), &["--lease", "2"], COUNTING, &arguments);
    first_rows.until("run").await;
    let (mut second, mut second_rows) =
        agent(&server.connect_file(), &["--lease", "2", "--standby"], COUNTING, &arguments);
    second_rows.until("standby").await;
    follow(&mut live, "half", |live| live.view().messages().open().iter().any(|m| m.text.ends_with(b"\n30\n"))).await;
    kill(&first, signal).await;
    let stopped = Instant::now();
    let (lost, at) = comes(&mut live, Kind::RUN_LOST).await;
    let took = at - stopped;
    assert!(took < LEASE + Duration::from_secs(1), "the run was lost after {took:?}");
    // Not a spinner: interrupted, until it is taken over.
    let (partial, status) = text(&live);
    assert_eq!(status, Status::Interrupted);
    let rows = second_rows.until("run").await;
    let granted = rows.last().expect("a row");
    assert_eq!(granted["taken_over"], true);
    assert_eq!(granted["offset"], partial.len());
    assert!(granted["epoch"].as_u64().expect("a number") > lost);
    comes(&mut live, Kind::RUN_END).await;
    // Everything once, by two agents.
    assert_eq!(text(&live), (counted(COUNT), Status::Complete));
    let status = timeout(PATIENCE, second.wait()).await.expect("in time").expect("a status");
    assert_eq!(status.code(), Some(0));
    let tail = live.view().next();
    if signal == "-STOP" {
        kill(&first, "-CONT").await;
        let rows = first_rows.until("error").await;
        assert_eq!(rows.last().expect("a row")["code"], "FENCED");
        let status = timeout(PATIENCE, first.wait()).await.expect("in time").expect("a status");
        assert_eq!(status.code(), Some(3));
        // Nothing of it is stored behind that but that it came back and left.
        let output =
            run(server.command(&["tail", "s1", "--json", "--until-idle", "300", "--from", &tail.to_string()])).await;
        let rows = events(&output.stdout);
        assert!(
            named(&rows, "record").iter().all(|row| row["kind"].as_str().is_some_and(|k| k.starts_with("presence.")))
        );
    }
    println!("{signal}: lost after {took:?} (lease {LEASE:?}), taken over at byte {}", partial.len());
}

/// Spec RUN-4, RUN-5, RUN-7.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_killed_is_lost_and_a_standby_goes_on_at_the_exact_byte() {
    takeover("-KILL").await;
}

/// Spec RUN-3: what it says when it wakes up is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_was_stopped_for_too_long_is_fenced_when_it_wakes_up() {
    takeover("-STOP").await;
}

/// Spec RUN-4: an agent that closes its connection is not waited for.
#[tokio::test]
async fn a_run_whose_holder_closed_its_connection_is_lost_at_once() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let watcher = server.client();
    let mut live = attach(&watcher).await.live().await.expect("live");
    let dying = server.client();
    let session = attach(&dying).await;
    session.start_run(Duration::from_secs(60), None).await.expect("a run");
    let standby = attach(&server.client()).await;
    let waits = tokio::spawn(async move { standby.take_run(None, Duration::from_secs(60)).await });
    comes(&mut live, Kind::RUN_START).await;
    dying.close();
    let closed = Instant::now();
    let (_, at) = comes(&mut live, Kind::RUN_LOST).await;
    println!("lost {:?} after the connection was closed", at - closed);
    assert!(at - closed < Duration::from_secs(1));
    let run = timeout(PATIENCE, waits).await.expect("in time").expect("no panic").expect("granted");
    assert!(run.taken_over().is_some());
    server.stop().await;
}

/// An agent that writes one message, token by token, until it is told to stop. Returns how many it wrote.
async fn answer(session: &Session, tokens: usize, input: Option<MessageId>) -> (usize, Option<String>) {
    let producer = session.producer("agent").await.expect("a producer");
    let mut signals = session.signals().await.expect("signals");
    let run = session.start_run(Duration::from_secs(10), input).await.expect("a run");
    let producer = producer.of_run(&run);
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    let mut written = 0;
    for _ in 0..tokens {
        tokio::select! {
            biased;
            told = signals.next() => {
                let told = told.expect("a signal");
                let signal = Signal::of(&told.record).expect("a signal");
                run.resolve(&producer, signal.id, Resolution::Consumed, "").await.expect("resolve");
                let status = if signal.intent == Intent::Cancel { Status::Cancelled } else { Status::Interrupted };
                writer.end(status, "told to").await.expect("end");
                let end = run.end(&producer, status, "told to").await.expect("end");
                end.await.expect("stored");
                return (written, Some(String::from_utf8_lossy(&signal.text).into_owned()));
            }
            () = tokio::time::sleep(Duration::from_millis(1)) => {
                writer.append("token ").await.expect("append");
                written += 1;
            }
        }
    }
    writer.end(Status::Complete, "").await.expect("end");
    let end = run.end(&producer, Status::Complete, "").await.expect("end");
    end.await.expect("stored");
    (written, None)
}

/// Scenario A1: the agent is here, has used a tool and speaks; the first tab is killed in the middle; the second one has, with its first
/// answer, everything up to a seq, and from there on what follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tab_that_is_killed_leaves_nothing_out_for_the_next_one() {
    const TOKENS: usize = 400;
    const GRACE: Duration = Duration::from_secs(2);
    let server = Server::start().await;
    let client = server.client(ClientConfig::default());
    let session = attach(&client).await;
    let doing = |status: &str| Doing::new(status).expect("a word");
    let member = session.join("agent", Duration::from_secs(10), doing("thinking")).await.expect("join");
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    // The result of the tool and what is said of it are one.
    let main = session.main();
    let key = Key::new("tool/42").expect("a key");
    let put = main.record(&StatePut { key, value: "7 °C".into(), lasts: 0 });
    producer.append_batch(&[put, main.data("tool 42 is done")]).await.expect("append").await.expect("stored");
    member.update(doing("streaming")).await.expect("update");

    // The first tab: a member, and a reader that shows what is said.
    let grace = GRACE.as_secs().to_string();
    let mut here = server.command(&["join", "s1", "--as", "tab 1", "--grace", &grace]).stdout(Stdio::null()).spawn();
    let here = here.as_mut().expect("join");
    let mut shown = server.command(&["tail", "s1", "--json"]).stdout(Stdio::piped()).spawn().expect("tail");
    let mut rows = Rows::of(shown.stdout.take().expect("output"));
    let (half, mut halfway) = tokio::sync::oneshot::channel::<()>();
    let of_run = producer.of_run(&run);
    let writer = MessageWriter::begin(&of_run, main, "assistant", "text/plain").await.expect("begin");
    let id = writer.id();
    let speaking = async {
        let mut half = Some(half);
        for n in 0..TOKENS {
            // The pace of a model that speaks.
            tokio::time::sleep(Duration::from_millis(5)).await;
            writer.append(format!("{n} ")).await.expect("append");
            if n == TOKENS / 2 {
                half.take().map(|half| half.send(())).expect("once").expect("somebody waits");
            }
        }
        writer.end(Status::Complete, "").await.expect("end").await.expect("stored");
        run.end(&producer, Status::Complete, "").await.expect("end").await.expect("stored")
    };
    let tabs = async {
        let mut read = 0;
        while read < TOKENS / 4 {
            let row = rows.until("record").await.pop().expect("a row");
            read += usize::from(row["kind"] == "message.append");
        }
        timeout(PATIENCE, &mut halfway).await.expect("in time").expect("half of it");
        for child in [&mut *here, &mut shown] {
            child.kill().await.expect("kill");
        }
        let killed = Instant::now();
        let second = server.client(ClientConfig::default());
        second.connected().await.expect("a connection");
        let asked = Instant::now();
        let mut live = second.session("s1").expect("a name").live().await.expect("live");
        let first = timeout(PATIENCE, live.next()).await.expect("in time").expect("an update").expect("no error");
        let answered = asked.elapsed();
        assert!(matches!(first, Update::Started), "{first:?}");
        let view = live.view();
        assert_eq!(
            view.members()
                .iter()
                .find(|(_, of)| of.name.as_str() == "agent")
                .expect("the agent")
                .1
                .activity
                .status
                .as_str(),
            "streaming"
        );
        assert_eq!(view.state().get("tool/42").expect("the tool's result").value, "7 °C");
        assert!(view.runs().active().any(|active| active.id == run.id()));
        let message = view.messages().get(id).expect("the message");
        let begun = message.text.clone();
        assert!(begun.len() > TOKENS / 2 && message.status == Status::Open && message.through < view.next());
        follow(&mut live, "the end", |live| {
            live.view().messages().get(id).is_some_and(|of| of.status == Status::Complete)
        })
        .await;
        follow(&mut live, "who was killed is lost", |live| live.view().members().len() == 1).await;
        (live, begun, answered, killed.elapsed())
    };
    let (end, (mut live, begun, answered, lost)) = tokio::join!(speaking, tabs);
    follow(&mut live, "the end of the run", |live| live.view().next() > end).await;
    let text = live.view().messages().get(id).expect("the message").text.clone();
    let expected: String = (0..TOKENS).map(|n| format!("{n} ")).collect();
    assert_eq!(String::from_utf8_lossy(&text), expected);
    assert!(text.starts_with(&begun), "what it began with is how it goes on");
    // From its last sign of life on.
    assert!(lost > GRACE / 2 && lost < GRACE + Duration::from_secs(1), "{lost:?}");
    println!(
        "second tab: all after {answered:?} with {} of {} bytes; the first one's member lost after {lost:?}",
        begun.len(),
        text.len()
    );
}

/// Scenario A2: one tab starts a run, another one interrupts it, and both see the same, in the same order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_tab_interrupts_and_both_see_the_same_in_the_same_order() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let agent = server.client();
    let working = attach(&agent).await;
    let work = tokio::spawn(async move {
        let (written, said) = answer(&working, 2000, None).await;
        // What it was told is what it does next.
        let next = answer(&working, 20, None).await;
        (written, said, next.0)
    });
    let mut a = attach(&server.client()).await.live().await.expect("live");
    follow(&mut a, "text", |live| live.view().messages().open().iter().any(|m| m.text.len() > 60)).await;
    let b_session = attach(&server.client()).await;
    let mut b = b_session.live().await.expect("live");
    follow(&mut b, "the view", |live| !live.view().messages().open().is_empty()).await;
    let sent = Instant::now();
    let seq = b_session.signal(Intent::Interrupt).text("shorter").send().await.expect("accepted");
    let answered = sent.elapsed();
    let (written, said, next) = timeout(PATIENCE, work).await.expect("in time").expect("no panic");
    assert_eq!((said.as_deref(), next), (Some("shorter"), 20));
    assert!(written < 2000);
    for live in [&mut a, &mut b] {
        follow(live, "the second run", |live| live.view().runs().finished().count() == 2).await;
    }
    // A cancel of what is over changes nothing.
    assert_eq!(refused(b_session.signal(Intent::Cancel).send().await), Code::RUN_OVER);
    let (first, second) = (a.view(), b.view());
    assert_eq!((first.next(), first.hash()), (second.next(), second.hash()));
    let messages: Vec<_> = first.messages().finished().map(|message| (message.status, message.start)).collect();
    let runs: Vec<_> = first.runs().finished().map(|run| (run.status, run.start)).collect();
    let resolved: Vec<_> = first.signals().resolved().map(|signal| (signal.seq, signal.outcome)).collect();
    assert_eq!(resolved, [(seq, SignalOutcome::Consumed)]);
    assert_eq!([messages[0].0, messages[1].0], [Status::Interrupted, Status::Complete]);
    // Partial message, signal, new run, new message.
    assert!(messages[0].1 < seq && seq < runs[1].1 && runs[1].1 < messages[1].1);
    println!("interrupted after {written} tokens; the signal was accepted after {answered:?}");
    server.stop().await;
}

/// Spec SIG-6, FLOW-1: what is on its way to an application that stopped reading does not delay a signal to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_passes_a_reader_that_has_stopped_reading() {
    const BOUND: Duration = Duration::from_secs(2);
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let flood = attach(&server.client()).await;
    let producer = flood.producer("flood").await.expect("a producer");
    for _ in 0..256 {
        producer.append(flood.main(), vec![b'x'; 32 * 1024]).await.expect("append");
    }
    producer.flush().await.expect("stored");
    let agent = server.client();
    let session = attach(&agent).await;
    // All of the connection's subscriptions, none of which is read.
    let mut unread = Vec::new();
    for _ in 0..8 {
        unread.push(session.subscribe(Start::Earliest).open().await.expect("subscribe"));
    }
    let run = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let mut signals = session.signals().await.expect("signals");
    let other = attach(&server.client()).await;
    let mut slowest = Duration::ZERO;
    for number in 0..20 {
        let sent = Instant::now();
        let seq = other.signal(Intent::Steer).run(run.id()).text(number.to_string()).send().await.expect("accepted");
        let told = timeout(BOUND, signals.next()).await.expect("in time").expect("a signal");
        slowest = slowest.max(sent.elapsed());
        assert_eq!(told.seq, seq);
        let own = session.signal(Intent::Custom).run(run.id()).send();
        timeout(BOUND, own).await.expect("in time").expect("accepted");
        let echo = timeout(BOUND, signals.next()).await.expect("in time").expect("its own");
        assert_eq!(Signal::of(&echo.record).expect("a signal").intent, Intent::Custom);
    }
    println!("20 signals past 8 MiB that nobody reads, the slowest after {slowest:?}");
    drop(unread);
    server.stop().await;
}

/// Scenario A15: many agents at work; one is cancelled, one dies, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_runs_only_the_one_that_is_meant_is_cancelled_and_only_the_one_that_died_is_lost() {
    const AGENTS: usize = 8;
    const TOKENS: usize = 300;
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let orchestrator = attach(&server.client()).await;
    orchestrator.configure(RunMode::Parallel, InputPolicy::Enqueue).await.expect("configured");
    let mut observers = Vec::new();
    for _ in 0..4 {
        observers.push(attach(&server.client()).await.live().await.expect("live"));
    }
    let mut agents = Vec::new();
    for number in 0..AGENTS {
        let client = server.client();
        let session = attach(&client).await;
        let producer = session.producer(&format!("agent-{number}")).await.expect("a producer");
        let signals = session.signals().await.expect("signals");
        let run = session.start_run(Duration::from_secs(10), None).await.expect("a run");
        agents.push((client, session, producer, signals, run));
    }
    let runs: Vec<_> = agents.iter().map(|agent| agent.4.id()).collect();
    let work = agents.into_iter().enumerate().map(|(number, (client, session, producer, mut signals, run))| {
        tokio::spawn(async move {
            let scoped = producer.of_run(&run);
            let stream = session.stream(&format!("agent-{number}")).await.expect("a stream");
            let writer = MessageWriter::begin(&scoped, stream, "assistant", "text/plain").await.expect("begin");
            let id = writer.id();
            for token in 0..TOKENS {
                writer.append(format!("{number}:{token} ")).await.expect("append");
                if number == 5 && token == TOKENS / 2 {
                    scoped.flush().await.expect("stored");
                    client.close();
                    return (id, token + 1);
                }
                tokio::select! {
                    biased;
                    told = signals.next() => {
                        let told = told.expect("a signal");
                        // Everybody hears of every signal; each looks whether it is meant.
                        if told.record.run == Some(run.id()) && told.record.kind == Kind::SIGNAL_CANCEL {
                            let signal = Signal::of(&told.record).expect("a signal");
                            run.resolve(&producer, signal.id, Resolution::Consumed, "").await.expect("resolve");
                            writer.end(Status::Cancelled, "").await.expect("end");
                            run.end(&producer, Status::Cancelled, "").await.expect("end").await.expect("stored");
                            return (id, token + 1);
                        }
                    }
                    () = tokio::time::sleep(Duration::from_millis(4)) => {}
                }
            }
            writer.end(Status::Complete, "").await.expect("end");
            run.end(&producer, Status::Complete, "").await.expect("end").await.expect("stored");
            (id, TOKENS)
        })
    });
    let work: Vec<_> = work.collect();
    follow(&mut observers[0], "text of the third", |live| {
        live.view().messages().open().iter().any(|m| m.run == Some(runs[3]) && m.text.len() > 100)
    })
    .await;
    orchestrator.signal(Intent::Cancel).run(runs[3]).send().await.expect("accepted");
    let mut texts = Vec::new();
    for task in work {
        texts.push(timeout(PATIENCE, task).await.expect("in time").expect("no panic"));
    }
    let enough = |live: &LiveView| {
        live.view().runs().finished().count() == AGENTS - 1
            && live.view().runs().current().iter().all(|r| r.lost.is_some())
    };
    for live in &mut observers {
        follow(live, "the ends", enough).await;
    }
    let hashes: Vec<_> = observers.iter().map(|live| (live.view().next(), live.view().hash())).collect();
    assert!(hashes.iter().all(|seen| *seen == hashes[0]), "{hashes:?}");
    let view = observers[0].view();
    for (number, (id, tokens)) in texts.iter().enumerate() {
        let message = view.messages().get(*id).expect("a message");
        let expected: String = (0..*tokens).map(|token| format!("{number}:{token} ")).collect();
        assert_eq!(String::from_utf8_lossy(&message.text), expected, "agent {number}");
        let (run, message_status) = match number {
            3 => (Some(Status::Cancelled), Status::Cancelled),
            5 => (None, Status::Interrupted),
            _ => (Some(Status::Complete), Status::Complete),
        };
        assert_eq!(view.runs().get_finished(runs[number]).map(|run| run.status), run, "agent {number}");
        assert_eq!(message.status, message_status, "agent {number}");
    }
    println!("{AGENTS} agents, {} records, cancelled 3 after {} tokens, lost 5", view.next(), texts[3].1);
    server.stop().await;
}

/// Says an input.
async fn say(producer: &Producer, session: &Session, text: &str) -> Result<(MessageId, u64), AppendError> {
    let writer = MessageWriter::begin(producer, session.main(), "user", "text/plain").await?;
    let id = writer.id();
    writer.append(text.to_owned()).await?;
    let end = writer.end(Status::Complete, "").await?;
    Ok((id, end.await?))
}

/// Spec RUN-8, RUN-9.
#[tokio::test]
async fn what_becomes_of_an_input_is_the_policy_of_the_session() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let person = attach(&server.client()).await;
    let typing = person.producer("person").await.expect("a producer");
    let session = attach(&server.client()).await;
    let producer = session.producer("agent").await.expect("a producer");
    let mut signals = session.signals().await.expect("signals");
    let mut live = session.live().await.expect("live");
    let waiting = async |live: &mut LiveView, last: u64| -> Vec<MessageId> {
        follow(live, "the input", |live| live.view().next() > last).await;
        live.view().runs().inputs().map(|input| input.message).collect()
    };
    let (first, _) = say(&typing, &person, "first").await.expect("taken");
    let run = session.start_run(Duration::from_secs(30), Some(first)).await.expect("a run");
    let (second, last) = say(&typing, &person, "second").await.expect("taken");
    assert_eq!(waiting(&mut live, last).await, [first, second], "enqueue");
    let texts: Vec<_> = run.inputs(live.view()).into_iter().map(|message| message.text.clone()).collect();
    assert_eq!(texts, [b"first".to_vec(), b"second".to_vec()]);
    let read = run.consumed(&producer, last).await.expect("append").await.expect("stored");
    assert_eq!(waiting(&mut live, read).await, [], "read");

    person.configure(RunMode::Single, InputPolicy::Reject).await.expect("configured");
    let error = say(&typing, &person, "no").await.expect_err("an agent is at work");
    assert_eq!(code(&error), Some(Code::RUN_ACTIVE));

    person.configure(RunMode::Single, InputPolicy::Latest).await.expect("configured");
    say(&typing, &person, "older").await.expect("taken");
    let (newest, last) = say(&typing, &person, "newest").await.expect("taken");
    assert_eq!(waiting(&mut live, last).await, [newest], "latest");

    person.configure(RunMode::Single, InputPolicy::Interrupt).await.expect("configured");
    let (urgent, _) = say(&typing, &person, "urgent").await.expect("taken");
    // Of the two that wait, which both came since the run began, the newest is named last.
    let told = loop {
        let told = timeout(PATIENCE, signals.next()).await.expect("in time").expect("a signal");
        let signal = Signal::of(&told.record).expect("a signal");
        if signal.target == mainstay_client::Target::Input(urgent) {
            break told;
        }
    };
    assert!(told.author.is_server());
    assert_eq!((told.record.kind, told.record.run), (Kind::SIGNAL_INTERRUPT, Some(run.id())));
    server.stop().await;
}

/// Spec SIG-2: a signal for an input finds the run that the input causes.
#[tokio::test]
async fn a_cancel_that_comes_before_the_run_is_heard_by_it() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let person = attach(&server.client()).await;
    let typing = person.producer("person").await.expect("a producer");
    let (input, _) = say(&typing, &person, "do it").await.expect("taken");
    assert_eq!(refused(person.signal(Intent::Cancel).send().await), Code::RUN_OVER, "there is none");
    let seq = person.signal(Intent::Cancel).input(input).send().await.expect("accepted");
    let again = attach(&server.client()).await.signal(Intent::Cancel).input(input).send().await.expect("accepted");
    assert_eq!(again, seq, "once is enough");
    let session = attach(&server.client()).await;
    let mut signals = session.signals().await.expect("signals");
    let run = session.start_run(Duration::from_secs(30), Some(input)).await.expect("a run");
    let told = timeout(PATIENCE, signals.next()).await.expect("in time").expect("a signal");
    assert_eq!(told.seq, seq);
    let mut live = session.live().await.expect("live");
    follow(&mut live, "the run", |live| live.view().runs().get(run.id()).is_some()).await;
    assert_eq!(live.view().signals().pending()[0].run, Some(run.id()));
    // Nobody says what became of it: the end of the run does.
    let producer = session.producer("agent").await.expect("a producer");
    run.end(&producer, Status::Complete, "").await.expect("end").await.expect("stored");
    follow(&mut live, "the end", |live| live.view().signals().pending().is_empty()).await;
    let resolved: Vec<_> = live.view().signals().resolved().map(|signal| signal.outcome).collect();
    assert_eq!(resolved, [SignalOutcome::NotConsumed]);
    server.stop().await;
}

/// Scenario A16, without the notification: an approval has one answer, or a deadline.
#[tokio::test]
async fn a_request_has_one_answer_or_a_deadline() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let session = attach(&server.client()).await;
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let mut signals = session.signals().await.expect("signals");
    let mut live = session.live().await.expect("live");
    let ask = async |lasts| {
        let (id, ticket) = run.request(&producer, "approval", lasts, "rm -r /").await.expect("append");
        ticket.await.expect("stored");
        id
    };
    let request = ask(Duration::from_secs(3600)).await;
    let phone = attach(&server.client()).await;
    let laptop = attach(&server.client()).await;
    let (one, other) = tokio::join!(
        phone.signal(Intent::Approve).request(request).send(),
        laptop.signal(Intent::Deny).request(request).send()
    );
    let answered = match (&one, &other) {
        (Ok(_), Err(_)) => RequestOutcome::Approved,
        (Err(_), Ok(_)) => RequestOutcome::Denied,
        _ => panic!("{one:?} and {other:?}"),
    };
    let late = one.and(other);
    assert_eq!(refused(late), Code::ALREADY_RESOLVED);
    let told = timeout(PATIENCE, signals.next()).await.expect("in time").expect("the answer");
    assert_eq!(told.record.run, Some(run.id()));
    let request = ask(Duration::from_millis(300)).await;
    let asked = Instant::now();
    let told = timeout(PATIENCE, signals.next()).await.expect("in time").expect("the expiry");
    assert_eq!(told.record.kind, Kind::REQUEST_EXPIRED);
    let waited = asked.elapsed();
    assert!(waited > Duration::from_millis(250) && waited < Duration::from_millis(1500), "{waited:?}");
    assert_eq!(refused(phone.signal(Intent::Approve).request(request).send().await), Code::ALREADY_RESOLVED);
    follow(&mut live, "both", |live| live.view().signals().answered().count() == 2).await;
    let outcomes: Vec<_> = live.view().signals().answered().map(|request| request.outcome).collect();
    assert_eq!(outcomes, [answered, RequestOutcome::Expired]);
    println!("the deadline of 300 ms was kept after {waited:?}");
    server.stop().await;
}

/// The process goes on while the server is dead and while the network is away for longer than its lease, and nothing of what it says is
/// missing or doubled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_process_says_is_stored_in_order_whatever_the_server_and_the_network_do() {
    const COUNT: u32 = 120;
    let mut server = Server::start().await;
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), Faults::default(), 7).expect("a proxy");
    let connect = server.connect_file_at(proxy.addr(), "through-proxy.json");
    let watcher = server.client(ClientConfig::default());
    let mut live = attach(&watcher).await.live().await.expect("live");
    let (mut child, mut rows) = agent(&connect, &["--lease", "1.5"], COUNTING, &[&COUNT.to_string(), "0.05"]);
    rows.until("run").await;
    let reached = |number: u32| {
        let end = format!("\n{number}\n");
        move |live: &LiveView| live.view().messages().open().iter().any(|m| m.text.ends_with(end.as_bytes()))
    };
    follow(&mut live, "20", reached(20)).await;
    server.kill().await;
    server.restart().await;
    follow(&mut live, "50", reached(50)).await;
    proxy.blackhole(true);
    // Nobody takes it over meanwhile.
    let (_, lost) = comes(&mut live, Kind::RUN_LOST).await;
    assert_eq!(text(&live).1, Status::Interrupted);
    proxy.blackhole(false);
    let (_, again) = comes(&mut live, Kind::RUN_START).await;
    comes(&mut live, Kind::RUN_END).await;
    assert_eq!(text(&live), (counted(COUNT), Status::Complete));
    let status = timeout(PATIENCE, child.wait()).await.expect("in time").expect("a status");
    assert_eq!(status.code(), Some(0));
    println!("lost for {:?} while the network was away; {} bytes, each once", again - lost, counted(COUNT).len());
}

/// Cancel from anywhere is SIGINT, and SIGTERM for who does not hear that; steering comes as lines; a pause is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_is_steered_paused_and_cancelled_from_elsewhere() {
    const STUBBORN: &str =
        "trap '' INT; echo ready; while read line; do echo \"heard $line\"; done; while :; do sleep 0.1; done";
    let server = Server::start().await;
    let watcher = server.client(ClientConfig::default());
    let mut live = attach(&watcher).await.live().await.expect("live");
    let (mut child, mut rows) = agent(&server.connect_file(), &["--patience", "0.3"], STUBBORN, &[]);
    rows.until("run").await;
    let said = |what: &'static str| {
        move |live: &LiveView| live.view().messages().open().iter().any(|m| m.text.ends_with(what.as_bytes()))
    };
    follow(&mut live, "output", said("ready\n")).await;
    let signal = async |arguments: &[&str]| -> Vec<Value> {
        let output = run(server.command(&[&["signal", "s1"], arguments, &["--wait", "--json"]].concat())).await;
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
        events(&output.stdout)
    };
    let steered = signal(&["steer", "--text", "left"]).await;
    assert_eq!(steered.last().expect("a row")["outcome"], "consumed");
    follow(&mut live, "what it heard", said("heard left\n")).await;
    signal(&["pause"]).await;
    follow(&mut live, "the pause", |live| {
        live.view().members().iter().any(|(_, m)| m.activity.status.as_str() == "paused")
    })
    .await;
    signal(&["resume"]).await;
    let output = run(server.command(&["append", "s1", "--role", "user", "--json"])).await;
    assert!(output.status.success());
    let asked = Instant::now();
    signal(&["cancel"]).await;
    comes(&mut live, Kind::RUN_END).await;
    let took = asked.elapsed();
    let status = timeout(PATIENCE, child.wait()).await.expect("in time").expect("a status");
    assert_eq!(status.code(), Some(1));
    let rows = rows.until("error").await;
    assert_eq!(named(&rows, "ended")[0]["status"], "cancelled");
    assert_eq!(text(&live).1, Status::Cancelled);
    let run = live.view().runs().finished().next_back().expect("a run").status;
    assert_eq!(run, Status::Cancelled);
    // Nobody is left, and nothing can be cancelled.
    let output = mainstay_tests::process::run(server.command(&["signal", "s1", "cancel", "--json"])).await;
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(events(&output.stdout)[0]["code"], "RUN_OVER");
    println!("a process that ignores SIGINT was ended {took:?} after the cancel");
}

/// Two agents cannot hold a run at once, and what each says of the other's is refused.
#[tokio::test]
async fn what_belongs_to_a_run_is_written_by_who_holds_it_alone() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let session = attach(&server.client()).await;
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let scoped = producer.of_run(&run);
    let writer = MessageWriter::begin(&scoped, session.main(), "assistant", "text/plain").await.expect("begin");
    writer.append("mine ").await.expect("append").await.expect("stored");
    let other = attach(&server.client()).await;
    assert_eq!(refused(other.start_run(Duration::from_secs(30), None).await), Code::RUN_ACTIVE);
    assert_eq!(refused(other.start_run_as(run.id(), Duration::from_secs(30), None).await), Code::RUN_ACTIVE);
    let meddling = other.producer("other").await.expect("a producer");
    let error = MessageWriter::resume(&meddling, other.main(), writer.id()).append("not mine").await.expect("sent");
    assert_eq!(code(&error.await.expect_err("refused")), Some(Code::RUN_FENCED));
    let error = run.end(&meddling, Status::Complete, "").await.expect("sent").await.expect_err("refused");
    assert_eq!(code(&error), Some(Code::RUN_FENCED), "under its epoch, but not by its holder");
    // What the holder lets go another one takes, at once, and goes on.
    let mut signals = session.signals().await.expect("signals");
    let epoch = run.epoch();
    run.release().await.expect("released");
    let told = timeout(PATIENCE, signals.next()).await.expect("in time").expect("the loss");
    assert_eq!(RunLost::of(&told.record).expect("a loss").epoch, epoch);
    let taken =
        timeout(PATIENCE, other.take_run(None, Duration::from_secs(30))).await.expect("in time").expect("granted");
    assert_eq!(taken.taken_over(), Some(epoch));
    let theirs = meddling.of_run(&taken);
    let theirs = MessageWriter::resume(&theirs, other.main(), writer.id());
    theirs.append("ours").await.expect("append").await.expect("stored");
    let late = writer.append("late").await.expect("sent").await.expect_err("refused");
    assert_eq!(code(&late), Some(Code::RUN_FENCED));
    // The producer is not what is fenced.
    producer.append(session.main(), "a remark").await.expect("append").await.expect("stored");
    let mut live = other.live().await.expect("live");
    follow(&mut live, "the text", |live| live.view().messages().open().iter().any(|m| m.text == b"mine ours")).await;
    server.stop().await;
}

/// Scenario A11, design §10: 256 kbit/s and 60 ms with a queue of 100 ms before the bottleneck; 1 MB on its way up from the agent, and
/// 1 MB on its way down to who wants it to stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_overtakes_a_flood() {
    const RTT: Duration = Duration::from_millis(60);
    const RATE: u64 = 256_000 / 8;
    const SAMPLES: usize = 20;
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let faults = Faults { delay: RTT / 2, rate: RATE, queue: RATE / 10, ..Faults::default() };
    let behind = |seed| Proxy::start(([127, 0, 0, 1], 0).into(), server.addr, faults, seed).expect("a proxy");
    let (before_agent, before_person) = (behind(11), behind(12));
    let flood = attach(&server.client()).await;
    let producer = flood.producer("flood").await.expect("a producer");
    for _ in 0..64 {
        producer.append(flood.main(), vec![b'x'; 16 * 1024]).await.expect("append");
    }
    producer.flush().await.expect("stored");
    let agent = attach(&server.client_at(before_agent.addr(), ClientConfig::default())).await;
    let run = agent.start_run(Duration::from_secs(60), None).await.expect("a run");
    let mut signals = agent.signals().await.expect("signals");
    let uploading = agent.producer("agent").await.expect("a producer");
    let mut last = None;
    for _ in 0..64 {
        last = Some(uploading.append(agent.main(), vec![b'y'; 16 * 1024]).await.expect("append"));
    }
    let last = last.expect("some");
    let person = attach(&server.client_at(before_person.addr(), ClientConfig::default())).await;
    let mut reading = person.subscribe(Start::Earliest).open().await.expect("subscribe");
    let in_order = tokio::spawn(async move {
        // Where the first signal comes in its place, behind everything else.
        while let Some(Ok(event)) = reading.next().await {
            if let mainstay_client::Event::Records(batch) = event
                && batch.iter().flatten().any(|read| read.record.kind == Kind::SIGNAL_STEER)
            {
                return Instant::now();
            }
        }
        panic!("the signal does not come in its place");
    });
    let begun = Instant::now();
    let (mut heard, mut echoed) = (Vec::new(), Vec::new());
    for _ in 0..SAMPLES {
        let sent = Instant::now();
        let echo = async {
            person.signal(Intent::Steer).run(run.id()).text("left").send().await.expect("accepted");
            sent.elapsed()
        };
        let hear = async {
            timeout(PATIENCE, signals.next()).await.expect("in time").expect("a signal");
            sent.elapsed()
        };
        let (echo, hear) = tokio::join!(echo, hear);
        echoed.push(echo);
        heard.push(hear);
    }
    let flooded = begun.elapsed();
    heard.sort();
    echoed.sort();
    let [p50, most] = [SAMPLES / 2, SAMPLES - 1];
    println!(
        "agent: p50 {:?}, most {:?}; echo: p50 {:?}, most {:?}",
        heard[p50], heard[most], echoed[p50], echoed[most]
    );
    // Both ways were full all the time, or it would say nothing.
    assert!(!in_order.is_finished() && last.outcome().is_none(), "the flood was over after {flooded:?}");
    for (what, times, more) in [("agent", &heard, 100), ("echo", &echoed, 200)] {
        assert!(times[p50] <= 2 * RTT + Duration::from_millis(more), "{what}: {times:?}");
        assert!(times[most] <= 2 * RTT + Duration::from_millis(more + 300), "{what}: {times:?}");
    }
    let behind = timeout(PATIENCE, in_order).await.expect("in time").expect("no panic") - begun;
    println!("behind the data, without a way of its own, the first one came after {behind:?}");
    assert!(behind > Duration::from_secs(10));
    server.stop().await;
}

/// Spec PRES-4, RUN-4, RUN-5, STATE-6, SIG-8: what is due after a restart is written although nobody asks for the session, and what is due
/// in a session that is not in memory wakes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_is_written_whether_or_not_anybody_asks_for_the_session() {
    let mut server = Server::start().await;
    let client = server.client(ClientConfig::default());
    let session = attach(&client).await;
    let producer = session.producer("agent").await.expect("a producer");
    let doing = Doing::new("thinking").expect("a status");
    session.join("agent", Duration::from_secs(1), doing).await.expect("join");
    let run = session.start_run(Duration::from_secs(1), None).await.expect("a run");
    let (_, asked) = run.request(&producer, "approval", Duration::from_millis(1500), "").await.expect("append");
    asked.await.expect("stored");
    // Another session, cold when its value expires: no member, no run.
    let cold = client.session("cold").expect("a name").create().attach().await.expect("attach");
    let writer = cold.producer("p").await.expect("a producer");
    let key = Key::new("k").expect("a key");
    let put = StatePut { key, value: "v".into(), lasts: 3500 };
    writer.append_record(cold.main().record(&put)).await.expect("append").await.expect("stored");
    server.kill().await;
    client.close();
    server.restart().await;
    // Until all of it was due: time is the subject.
    tokio::time::sleep(Duration::from_millis(5500)).await;
    server.kill().await;
    let output = run_verify(&server).await;
    let of = |session: &str| -> Vec<String> {
        let rows = output.iter().filter(|row| row["session"] == session);
        rows.filter_map(|row| row["kind"].as_str().map(str::to_owned)).collect()
    };
    let kinds = of("s1");
    for kind in ["presence.left", "run.lost", "request.expired"] {
        assert_eq!(kinds.iter().filter(|known| *known == kind).count(), 1, "{kind} in {kinds:?}");
    }
    assert_eq!(of("cold"), ["state.put", "state.expired"]);
}

/// Every record of a stopped server.
async fn run_verify(server: &Server) -> Vec<Value> {
    let mut command = Command::new(mainstay_tests::process::binary());
    command.args(["verify", "--dump", "--data"]).arg(server.dir()).stdin(Stdio::null());
    let output = run(command).await;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    named(&events(&output.stdout), "record").into_iter().cloned().collect()
}

/// Appends lines as inputs; returns their message ids.
async fn inputs(server: &Server, lines: &str) -> Vec<String> {
    let mut child = server
        .command(&["append", "s1", "--role", "user", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start append");
    let mut stdin = child.stdin.take().expect("input");
    tokio::io::AsyncWriteExt::write_all(&mut stdin, lines.as_bytes()).await.expect("write");
    drop(stdin);
    let output = timeout(PATIENCE, child.wait_with_output()).await.expect("in time").expect("a status");
    assert!(output.status.success());
    let acks = events(&output.stdout);
    named(&acks, "ack").iter().map(|ack| ack["message"].as_str().expect("an id").to_owned()).collect()
}

/// Everything that the messages of role `assistant` hold, in the order in which they began.
async fn said(server: &Server) -> String {
    let client = server.client(ClientConfig::default());
    let mut live = attach(&client).await.live().await.expect("live");
    follow(&mut live, "the view", |live| live.view().next() > 0).await;
    let messages = live.view().messages();
    let mut all: Vec<_> = messages.finished().chain(messages.open()).filter(|m| !m.is_input()).collect();
    all.sort_by_key(|message| message.start);
    all.into_iter().map(|message| String::from_utf8_lossy(&message.text).into_owned()).collect()
}

async fn exit(child: &mut Child) -> Option<i32> {
    timeout(PATIENCE, child.wait()).await.expect("it ends in time").expect("a status").code()
}

/// Spec RUN-9: what stops a run is for the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_input_that_interrupts_a_run_is_read_by_the_next_one() {
    let server = Server::start().await;
    let configured = run(server.command(&["session", "configure", "s1", "--inputs", "interrupt"])).await;
    assert!(configured.status.success());
    // Reads whatever it is given, until it is stopped.
    let (mut first, mut rows) = agent(&server.connect_file(), &[], "while read l; do echo \"1 $l\"; done", &[]);
    rows.until("run").await;
    inputs(&server, "hi\n").await;
    assert_eq!(exit(&mut first).await, Some(1));
    let (mut second, _rows) = agent(&server.connect_file(), &[], "read l; echo \"2 $l\"", &[]);
    assert_eq!(exit(&mut second).await, Some(0));
    assert_eq!(said(&server).await, "2 hi\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_ends_with_its_session_and_so_does_its_process() {
    let server = Server::start().await;
    let (mut child, mut rows) = agent(&server.connect_file(), &["--patience", "0.3"], "echo $$; sleep 60", &[]);
    rows.until("run").await;
    let client = server.client(ClientConfig::default());
    let mut live = attach(&client).await.live().await.expect("live");
    follow(&mut live, "its id", |live| live.view().messages().open().iter().any(|m| m.text.ends_with(b"\n"))).await;
    let process: u32 = text(&live).0.trim().parse().expect("a process id");
    let closed = run(server.command(&["session", "close", "s1"])).await;
    assert!(closed.status.success());
    assert_eq!(rows.until("error").await.last().expect("a row")["code"], "SESSION_CLOSED");
    assert_eq!(exit(&mut child).await, Some(3));
    assert!(!Path::new(&format!("/proc/{process}")).exists(), "its process goes on");
}

/// An agent that says much about itself while there is no server can still be stopped where it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_without_a_server_can_be_stopped() {
    const STATUS: &str = r#"
        i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo '{"type":"CUSTOM","name":"status","value":"s'$i'"}'; done
        echo ready > "$1"; while :; do sleep 0.1; done
    "#;
    let mut server = Server::start().await;
    let ready = server.dir().join("ready");
    let script = format!("while [ ! -e \"$1.go\" ]; do sleep 0.05; done\n{STATUS}");
    let path = ready.to_string_lossy().into_owned();
    let options = ["--events", "--lease", "1", "--patience", "0.3"];
    let (mut child, mut rows) = agent(&server.connect_file(), &options, &script, &[&path]);
    rows.until("run").await;
    server.kill().await;
    std::fs::write(server.dir().join("ready.go"), "").expect("write");
    let said = async {
        while !ready.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, said).await.expect("its output is read");
    kill(&child, "-INT").await;
    let asked = Instant::now();
    assert_eq!(exit(&mut child).await, Some(1));
    println!("stopped after {:?} without a server", asked.elapsed());
    assert!(asked.elapsed() < Duration::from_secs(15));
}

/// Spec RUN-3, RUN-5: also one that had nothing to say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_agent_takes_its_run_again_after_an_outage() {
    let server = Server::start().await;
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), Faults::default(), 7).expect("a proxy");
    let connect = server.connect_file_at(proxy.addr(), "through-proxy.json");
    let watcher = server.client(ClientConfig::default());
    let mut live = attach(&watcher).await.live().await.expect("live");
    let script = "while [ ! -e \"$1\" ]; do sleep 0.1; done; echo out";
    let go = server.dir().join("go");
    let (mut child, mut rows) = agent(&connect, &["--lease", "1"], script, &[&go.to_string_lossy()]);
    rows.until("run").await;
    proxy.blackhole(true);
    comes(&mut live, Kind::RUN_LOST).await;
    proxy.blackhole(false);
    comes(&mut live, Kind::RUN_START).await;
    std::fs::write(&go, "").expect("write");
    assert_eq!(exit(&mut child).await, Some(0));
    comes(&mut live, Kind::RUN_END).await;
    assert_eq!(text(&live), ("out\n".to_owned(), Status::Complete));
}

/// Spec SIG-2: a process hears what was wanted of it before it ran; and not what another one did already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_hears_each_signal_that_nobody_took_and_no_other() {
    let server = Server::start().await;
    let input = inputs(&server, "do it\n").await.remove(0);
    let cancel = ["signal", "s1", "cancel", "--input", &input, "--json"];
    assert!(run(server.command(&cancel)).await.status.success());
    let (mut child, mut rows) = agent(&server.connect_file(), &["--input", &input], "sleep 30", &[]);
    let rows = rows.until("ended").await;
    assert_eq!(rows.last().expect("a row")["status"], "cancelled");
    assert_eq!(exit(&mut child).await, Some(1));
    // The second one stands by while the first one is steered.
    let hears = "while read l; do echo \"$1 $l\"; done";
    let (first, mut first_rows) = agent(&server.connect_file(), &["--lease", "1"], hears, &["A"]);
    first_rows.until("run").await;
    let (mut second, mut second_rows) = agent(&server.connect_file(), &["--lease", "1", "--standby"], hears, &["B"]);
    second_rows.until("standby").await;
    let steer = |text: &'static str| run(server.command(&["signal", "s1", "steer", "--text", text, "--wait"]));
    assert!(steer("one").await.status.success());
    kill(&first, "-KILL").await;
    second_rows.until("run").await;
    assert!(steer("two").await.status.success());
    assert!(run(server.command(&["signal", "s1", "cancel", "--wait"])).await.status.success());
    assert_eq!(exit(&mut second).await, Some(1));
    let heard = said(&server).await;
    assert!(heard.ends_with("A one\nB two\n"), "{heard}");
    assert_eq!(heard.matches("one").count(), 1, "{heard}");
}

/// A process that asks people learns that nobody answered in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_is_told_that_its_request_expired() {
    const ASKS: &str = r#"
        echo '{"type":"CUSTOM","name":"request","value":{"needs":"approval","lasts":0.5,"body":"may I"}}'
        read l; echo "{\"type\":\"TEXT_MESSAGE_START\",\"messageId\":\"m\"}"
        case "$l" in *request.expired*) w=nobody;; *) w=what;; esac
        echo '{"type":"TEXT_MESSAGE_CONTENT","messageId":"unknown","delta":"lost"}'
        echo '{"type":"TEXT_MESSAGE_START","messageId":"u","role":"user"}'
        echo "{\"type\":\"TEXT_MESSAGE_CONTENT\",\"messageId\":\"m\",\"delta\":\"$w\"}"
        echo '{"type":"TEXT_MESSAGE_END","messageId":"m"}'
    "#;
    let server = Server::start().await;
    let (mut child, mut rows) = agent(&server.connect_file(), &["--events"], ASKS, &[]);
    let rows = rows.until("ended").await;
    // A line that makes no sense is told of, and costs the others nothing.
    assert_eq!(named(&rows, "warning").iter().filter(|row| row["code"] == "MESSAGE_NOT_OPEN").count(), 1, "{rows:?}");
    assert_eq!(rows.last().expect("a row")["status"], "complete");
    assert_eq!(exit(&mut child).await, Some(0));
    assert_eq!(said(&server).await, "nobody");
}

/// More inputs wait than the view keeps the texts of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_input_that_waits_is_read_whatever_the_view_keeps() {
    const COUNT: usize = 150;
    let server = Server::start().await;
    let lines: String = (1..=COUNT).map(|n| format!("{n}\n")).collect();
    inputs(&server, &lines).await;
    let (mut child, _rows) = agent(&server.connect_file(), &[], "head -n \"$1\"", &[&COUNT.to_string()]);
    assert_eq!(exit(&mut child).await, Some(0));
    assert_eq!(said(&server).await, lines);
}

/// The same run, begun again by name after its agent was killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_begun_again_by_its_id_goes_on_where_it_stopped() {
    let server = Server::start().await;
    let id = "00112233445566778899aabbccddeeff";
    let options = ["--lease", "1", "--run", id];
    let (first, mut rows) = agent(&server.connect_file(), &options, "printf 'one '; cat > /dev/null", &[]);
    rows.until("run").await;
    let client = server.client(ClientConfig::default());
    let mut live = attach(&client).await.live().await.expect("live");
    follow(&mut live, "text", |live| live.view().messages().open().iter().any(|m| m.text == b"one ")).await;
    kill(&first, "-KILL").await;
    comes(&mut live, Kind::RUN_LOST).await;
    let (mut second, mut rows) = agent(&server.connect_file(), &options, "printf \"$MAINSTAY_OFFSET\"", &[]);
    let granted = rows.until("run").await.pop().expect("a row");
    assert_eq!((&granted["taken_over"], &granted["offset"]), (&Value::from(true), &Value::from(4)));
    assert_eq!(exit(&mut second).await, Some(0));
    assert_eq!(said(&server).await, "one 4");
}

/// Spec SIG-1, SIG-3, RUN-7: as many signals as may wait, long ones, over a slow link, cost a take-over nothing; many cancels are one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_takes_a_run_over_whatever_waits_for_it() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = server.client();
    let session = attach(&client).await;
    let run = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let mut sent = 0;
    while session.signal(Intent::Steer).run(run.id()).text(vec![b'x'; 2048]).send().await.is_ok() {
        sent += 1;
    }
    assert!(sent >= 40, "{sent}");
    // There is always room for a cancel, and one is enough.
    let cancels = (0..12).map(|_| session.signal(Intent::Cancel).run(run.id()).send());
    let mut seqs = Vec::new();
    for cancel in cancels.map(tokio::spawn).collect::<Vec<_>>() {
        seqs.push(cancel.await.expect("no panic").expect("accepted"));
    }
    assert!(seqs.iter().all(|seq| *seq == seqs[0]), "{seqs:?}");
    let faults = Faults { delay: Duration::from_millis(50), ..Faults::default() };
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr, faults, 5).expect("a proxy");
    let standby = attach(&server.client_at(proxy.addr(), ClientConfig::default())).await;
    let mut signals = standby.signals().await.expect("signals");
    let waits = tokio::spawn(async move { standby.take_run(None, Duration::from_secs(30)).await });
    for _ in 0..=sent {
        timeout(PATIENCE, signals.next()).await.expect("in time").expect("a signal");
    }
    run.release().await.expect("released");
    let taken = timeout(PATIENCE, waits).await.expect("in time").expect("no panic").expect("granted");
    let mut live = session.live().await.expect("live");
    follow(&mut live, "the take-over", |live| live.view().next() > taken.epoch()).await;
    let run = live.view().runs().get(taken.id()).expect("the run");
    assert_eq!((run.epoch, run.lost), (taken.epoch(), None), "it was taken over once");
    server.stop().await;
}

/// Spec RUN-7: who may not is told.
#[tokio::test]
async fn who_may_not_hold_runs_or_send_signals_is_told_so() {
    use mainstay_protocol::session::Operation;
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let session = attach(&server.client()).await;
    session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let reader = mainstay_tests::harness::claims("reader", "", [Operation::Read, Operation::Append]);
    let reader = attach(&server.client_as(&reader, ClientConfig::default())).await;
    let lease = Duration::from_secs(30);
    assert_eq!(refused(timeout(PATIENCE, reader.take_run(None, lease)).await.expect("an answer")), Code::FORBIDDEN);
    assert_eq!(refused(reader.start_run(lease, None).await), Code::FORBIDDEN);
    assert_eq!(refused(reader.signal(Intent::Cancel).send().await), Code::FORBIDDEN);
    assert_eq!(refused(reader.configure(RunMode::Open, InputPolicy::Latest).await), Code::FORBIDDEN);
    server.stop().await;
}

/// Scenario A19, *cancel any and own*, and spec SIG-9: a person stops what they asked for, whatever was said since, and nobody else's.
#[tokio::test]
async fn who_may_signal_for_their_own_stops_what_they_asked_for_and_nothing_else() {
    use mainstay_protocol::session::Operation::{Append, Join, Manage, Read, Run, Signal, SignalOwn};
    use mainstay_protocol::session::{Payload, Record, RequestOpened};
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let session = attach(&server.client()).await;
    session.configure(RunMode::Parallel, InputPolicy::Enqueue).await.expect("configured");
    let person = async |subject: &str| {
        let claims = mainstay_tests::harness::claims(subject, "", [Read, Append, Join, SignalOwn]);
        let person = attach(&server.client_as(&claims, ClientConfig::default())).await;
        let typing = person.producer(&subject.replace('/', "-")).await.expect("a producer");
        (person, typing)
    };
    // A person, one of their devices, somebody whose name begins in the same way, and who is in charge.
    let (alice, alice_types) = person("alice").await;
    let (phone, phone_types) = person("alice/phone").await;
    let (alicey, alicey_types) = person("alicey").await;
    let claims = mainstay_tests::harness::claims("chief", "", [Read, Signal, Manage]);
    let chief = attach(&server.client_as(&claims, ClientConfig::default())).await;
    let claims = mainstay_tests::harness::claims("agent", "", [Read, Append, Run, SignalOwn]);
    let agent = attach(&server.client_as(&claims, ClientConfig::default())).await;
    let works = agent.producer("agent").await.expect("a producer");
    let lease = Duration::from_secs(60);

    let (hers, _) = say(&alice_types, &alice, "hers").await.expect("taken");
    let (phones, _) = say(&phone_types, &phone, "the phone's").await.expect("taken");
    let (other, _) = say(&alicey_types, &alicey, "somebody else's").await.expect("taken");
    // Of an input before any run has read it.
    for (who, input) in [(&alicey, hers), (&alicey, phones), (&alice, other), (&phone, hers), (&agent, hers)] {
        assert_eq!(refused(who.signal(Intent::Cancel).input(input).send().await), Code::FORBIDDEN);
    }
    alice.signal(Intent::Steer).input(phones).text("briefly").send().await.expect("it is below her");
    assert_eq!(refused(alice.signal(Intent::Cancel).input(MessageId([7; 16])).send().await), Code::FORBIDDEN);

    let run = agent.start_run(lease, Some(hers)).await.expect("a run");
    let another = agent.start_run(lease, Some(other)).await.expect("a run");
    let without = agent.start_run(lease, None).await.expect("a run that nobody asked for");
    // More than a view keeps: whose the run is does not depend on it.
    for number in 0..2 * mainstay_protocol::registry::KEPT_MESSAGES {
        say(&alicey_types, &alicey, &number.to_string()).await.expect("taken");
    }
    let (request, ticket) = run.request(&works, "approval", lease, "rm -r /").await.expect("append");
    ticket.await.expect("stored");
    // Of no run, and of one that never was.
    let nobodys = [None, Some(mainstay_client::RunId([8; 16]))].map(|run| {
        let request = mainstay_client::RequestId([if run.is_some() { 9 } else { 10 }; 16]);
        let (needs, body) = ("question".parse().expect("a label"), bytes::Bytes::new());
        let opened = RequestOpened { request, needs, lasts: 60_000, body };
        (request, Record { run, ..opened.record(mainstay_protocol::registry::STREAM_MAIN) })
    });
    alicey_types
        .append_batch(&nobodys.each_ref().map(|(_, record)| record.clone()))
        .await
        .expect("append")
        .await
        .expect("stored");
    for who in [&alicey, &phone] {
        assert_eq!(refused(who.signal(Intent::Cancel).run(run.id()).send().await), Code::FORBIDDEN);
        assert_eq!(refused(who.signal(Intent::Cancel).input(hers).send().await), Code::FORBIDDEN);
        assert_eq!(refused(who.signal(Intent::Approve).request(request).send().await), Code::FORBIDDEN);
        assert_eq!(refused(who.signal(Intent::Cancel).run(without.id()).send().await), Code::FORBIDDEN);
        for (request, _) in &nobodys {
            assert_eq!(refused(who.signal(Intent::Reply).request(*request).send().await), Code::FORBIDDEN);
        }
    }
    assert_eq!(refused(alice.signal(Intent::Cancel).run(another.id()).send().await), Code::FORBIDDEN);
    // Nothing of it was stored, and whoever was refused goes on.
    alice.signal(Intent::Approve).request(request).send().await.expect("her run asks");
    let seq = alice.signal(Intent::Cancel).run(run.id()).send().await.expect("her run");
    assert_eq!(alice.signal(Intent::Cancel).input(hers).send().await.expect("the same"), seq);
    alicey.signal(Intent::Cancel).run(another.id()).send().await.expect("their own");
    agent.signal(Intent::Cancel).run(without.id()).send().await.expect("who holds it may");
    let id = without.id();
    agent.signal(Intent::Custom).run(id).send().await.expect("again");
    for run in [&run, &another, &without] {
        chief.signal(Intent::Interrupt).run(run.id()).send().await.expect("any");
    }
    for (request, _) in &nobodys {
        chief.signal(Intent::Reply).request(*request).send().await.expect("any");
    }
    say(&alicey_types, &alicey, "still here").await.expect("taken");

    let mut live = session.live().await.expect("live");
    follow(&mut live, "all of it", |live| live.view().signals().pending().len() == 10).await;
    let askers =
        live.view().runs().current().iter().map(|run| run.asker.as_ref().map(|asker| asker.subject.to_string()));
    assert_eq!(askers.collect::<Vec<_>>(), [Some("alice".to_owned()), Some("alicey".to_owned()), None]);
    let senders = live.view().signals().pending().iter().map(|pending| pending.author.subject.to_string());
    assert!(senders.into_iter().all(|sender| sender != "alice/phone"));
    server.stop().await;
}

/// An application that falls behind misses what others took, never what is still wanted.
#[tokio::test]
async fn a_listener_that_falls_behind_hears_of_every_signal_that_nobody_took() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let session = attach(&server.client()).await;
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let mut late = attach(&server.client()).await.signals().await.expect("signals");
    for _ in 0..200 {
        let signal = session.signal(Intent::Steer).run(run.id());
        let id = signal.id();
        signal.send().await.expect("accepted");
        run.resolve(&producer, id, Resolution::Consumed, "").await.expect("append").await.expect("stored");
    }
    let wanted = session.signal(Intent::Pause).run(run.id()).send().await.expect("accepted");
    let mut heard = 0;
    loop {
        let told = timeout(PATIENCE, late.next()).await.expect("in time").expect("a signal");
        heard += 1;
        if told.seq == wanted {
            break;
        }
    }
    println!("heard {heard} of 401");
    assert!(heard < 401, "it did not fall behind");
    let last = session.signal(Intent::Resume).run(run.id()).send().await.expect("accepted");
    assert_eq!(timeout(PATIENCE, late.next()).await.expect("in time").expect("a signal").seq, last);
    server.stop().await;
}
