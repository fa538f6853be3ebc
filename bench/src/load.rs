//! The scenarios.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mainstay_client::{Client, Config, Event, MessageWriter, Producer, Session, Start, Subscription, Ticket, Update};
use mainstay_tests::proxy::{Faults, Proxy};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::report::{Latencies, Report};
use crate::target::{Disk, Target};

/// Settings of a scenario; each uses those that concern it.
#[derive(Debug, Clone)]
pub struct Options {
    /// Connections.
    pub connections: usize,
    /// Sessions, spread over the connections.
    pub sessions: usize,
    /// Records in flight for each session.
    pub window: usize,
    /// Bytes of a record's payload.
    pub bytes: usize,
    /// Records a second for each session.
    pub rate: u64,
    /// Subscribers, each with a connection of its own.
    pub subscribers: usize,
    /// Records to write before a replay.
    pub records: u64,
    /// How long load lasts.
    pub time: Duration,
    /// Round-trip time to emulate.
    pub rtt: Duration,
}

type Outcome = Result<Report, String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Names that no earlier run used.
fn fresh(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("bench:{}:{prefix}:{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

async fn clients(target: &Target, count: usize) -> Result<Vec<Client>, String> {
    let mut clients = Vec::with_capacity(count);
    for _ in 0..count {
        clients.push(target.client(Config::default()).map_err(text)?);
    }
    for client in &clients {
        client.connected().await.map_err(text)?;
    }
    Ok(clients)
}

async fn session(client: &Client, name: &str) -> Result<Session, String> {
    client.session(name).map_err(text)?.create().attach().await.map_err(text)
}

async fn producer(client: &Client, name: &str) -> Result<(Session, Producer), String> {
    let session = session(client, name).await?;
    let producer = session.producer("bench").await.map_err(text)?;
    Ok((session, producer))
}

async fn join<T: 'static>(mut tasks: JoinSet<Result<T, String>>) -> Result<Vec<T>, String> {
    let mut all = Vec::new();
    while let Some(result) = tasks.join_next().await {
        all.push(result.map_err(text)??);
    }
    Ok(all)
}

/// Durable appends in a closed loop: each session keeps a window of records in flight.
pub async fn append(target: &Target, options: &Options) -> Outcome {
    let Options { connections, sessions, window, bytes, time, .. } = *options;
    let clients = clients(target, connections).await?;
    let mut producers = Vec::with_capacity(sessions);
    for n in 0..sessions {
        producers.push(producer(&clients[n % connections], &fresh("append")).await?);
    }
    let cpu = target.cpu();
    let begun = Instant::now();
    let end = begun + time;
    let mut tasks = JoinSet::new();
    for (session, producer) in producers {
        let payload = Bytes::from(vec![b'x'; bytes]);
        tasks.spawn(async move {
            let mut flying: VecDeque<(Instant, Ticket)> = VecDeque::with_capacity(window);
            let (mut latencies, mut count) = (Latencies::default(), 0u64);
            let main = session.main();
            loop {
                let now = Instant::now();
                if now >= end {
                    break;
                }
                while flying.len() < window {
                    flying.push_back((now, producer.append(main, payload.clone()).await.map_err(text)?));
                }
                if let Some((sent, ticket)) = flying.pop_front() {
                    ticket.wait().await.map_err(text)?;
                    latencies.add(sent.elapsed());
                    count += 1;
                }
                // Everything that is known by now is taken together.
                while let Some((sent, ticket)) = flying.front() {
                    match ticket.outcome() {
                        Some(outcome) => drop(outcome.map_err(text)?),
                        None => break,
                    }
                    latencies.add(sent.elapsed());
                    count += 1;
                    flying.pop_front();
                }
            }
            for (_, ticket) in flying {
                ticket.wait().await.map_err(text)?;
                count += 1;
            }
            Ok((count, latencies))
        });
    }
    let results = join(tasks).await?;
    let took = begun.elapsed();
    let mut latencies = Latencies::default();
    results.iter().for_each(|(_, more)| latencies.merge(more));
    let count: u64 = results.iter().map(|(count, _)| count).sum();
    let mut report = Report::new(format!("append {connections} connections, {sessions} sessions x {window}"));
    report.add("durable appends", "records/s", count as f64 / took.as_secs_f64());
    report.latencies(["append to ack p50", "append to ack p99", "append to ack p99.9"], &latencies);
    if let (Some(before), Some(after)) = (cpu, target.cpu()) {
        report.add("server CPU", "s per million", (after - before).as_secs_f64() / (count as f64 / 1e6));
    }
    Ok(report)
}

/// Payloads that say when they should have been sent.
fn stamped(epoch: Instant, due: Instant, bytes: usize) -> Bytes {
    let mut payload = vec![b'x'; bytes.max(8)];
    let nanos = u64::try_from(due.duration_since(epoch).as_nanos()).unwrap_or(u64::MAX);
    payload[..8].copy_from_slice(&nanos.to_be_bytes());
    payload.into()
}

/// Reads what was appended to the last record, and how late each came. How many there are is known once the last is durable.
///
/// Errors: records that never come. To leave them out would flatter the server.
async fn follow(
    mut subscription: Subscription,
    epoch: Instant,
    mut appended: watch::Receiver<Option<u64>>,
) -> Result<Latencies, String> {
    let mut latencies = Latencies::default();
    let mut patience: Option<Instant> = None;
    loop {
        let total = *appended.borrow_and_update();
        if total.is_some_and(|total| latencies.count() >= total) {
            return Ok(latencies);
        }
        let deadline = *patience.get_or_insert(Instant::now() + PATIENCE);
        let event = tokio::select! {
            event = subscription.next() => event.ok_or("a subscription ended")?.map_err(text)?,
            changed = appended.changed(), if total.is_none() => {
                changed.map_err(|_| "the appends failed")?;
                patience = None;
                continue;
            }
            () = sleep_until(deadline) => {
                return Err(format!("only {} of {total:?} records were delivered", latencies.count()));
            }
        };
        if let Event::Records(batch) = event {
            patience = None;
            let now = Instant::now();
            for record in batch.iter() {
                let record = record.map_err(text)?;
                let stamp = record.record.payload.first_chunk::<8>().ok_or("a record is too short")?;
                let due = epoch + Duration::from_nanos(u64::from_be_bytes(*stamp));
                latencies.add(now.saturating_duration_since(due));
            }
        }
    }
}

/// Says when each record of `sessions` is due, evenly spread, from a thread of its own: the runtime's timers are only good to a
/// millisecond, which would be measured as latency of the server.
fn pace(sessions: usize, rate: u64, epoch: Instant, end: Instant) -> Vec<mpsc::Receiver<Instant>> {
    // A second's worth: a session that falls further behind makes the others late too, and shows.
    let capacity = usize::try_from(rate).unwrap_or(usize::MAX).clamp(16, 65_536);
    let (tell, due): (Vec<_>, Vec<_>) = (0..sessions).map(|_| mpsc::channel(capacity)).unzip();
    let step = Duration::from_secs_f64(1.0 / rate as f64 / sessions as f64);
    std::thread::spawn(move || {
        let mut at = epoch;
        for tell in tell.iter().cycle() {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if at >= end || tell.blocking_send(at).is_err() {
                return;
            }
            at += step;
        }
    });
    due
}

/// Appends a record whenever one is due and measures from then.
async fn paced(
    session: Session,
    producer: Producer,
    bytes: usize,
    epoch: Instant,
    mut due: mpsc::Receiver<Instant>,
) -> Result<Latencies, String> {
    let (tickets, mut waiting) = mpsc::channel::<(Instant, Ticket)>(65_536);
    let acks = tokio::spawn(async move {
        let mut latencies = Latencies::default();
        while let Some((due, ticket)) = waiting.recv().await {
            ticket.wait().await.map_err(text)?;
            latencies.add(due.elapsed());
        }
        Ok::<_, String>(latencies)
    });
    while let Some(due) = due.recv().await {
        let ticket = producer.append(session.main(), stamped(epoch, due, bytes)).await.map_err(text)?;
        tickets.send((due, ticket)).await.map_err(text)?;
    }
    drop(tickets);
    acks.await.map_err(text)?
}

async fn caught_up(session: &Session) -> Result<Subscription, String> {
    let mut subscription = session.subscribe(Start::Latest).open().await.map_err(text)?;
    loop {
        let event = subscription.next().await.ok_or("a subscription ended")?.map_err(text)?;
        if matches!(event, Event::CaughtUp { .. }) {
            return Ok(subscription);
        }
    }
}

/// Time before the first measured record, for everything to have started.
const LEAD: Duration = Duration::from_millis(200);
/// How long a follower waits for the next record that is due before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sessions at a modest rate, each with a producer and a follower on connections of their own.
pub async fn live(target: &Target, options: &Options) -> Outcome {
    let Options { sessions, rate, time, bytes, .. } = *options;
    let (writers, readers) = (clients(target, sessions).await?, clients(target, sessions).await?);
    let mut pairs = Vec::new();
    for (writer, reader) in writers.iter().zip(&readers) {
        let name = fresh("live");
        let pair = producer(writer, &name).await?;
        pairs.push((pair, caught_up(&session(reader, &name).await?).await?));
    }
    let epoch = Instant::now() + LEAD;
    let cpu = target.cpu();
    let (mut writing, mut reading) = (JoinSet::new(), JoinSet::new());
    let due = pace(sessions, rate, epoch, epoch + time);
    for (((session, producer), subscription), due) in pairs.into_iter().zip(due) {
        let (tell, appended) = watch::channel(None);
        writing.spawn(async move {
            let latencies = paced(session, producer, bytes, epoch, due).await?;
            tell.send_replace(Some(latencies.count()));
            Ok(latencies)
        });
        reading.spawn(follow(subscription, epoch, appended));
    }
    let (mut acks, mut deliveries) = (Latencies::default(), Latencies::default());
    join(writing).await?.iter().for_each(|more| acks.merge(more));
    join(reading).await?.iter().for_each(|more| deliveries.merge(more));
    let count = deliveries.count();
    let mut report = Report::new(format!("live {sessions} sessions x {rate}/s"));
    report.add("deliveries", "records/s", count as f64 / time.as_secs_f64());
    report.latencies(["append to ack p50", "append to ack p99", "append to ack p99.9"], &acks);
    report.latencies(["append to delivered p50", "append to delivered p99", "append to delivered p99.9"], &deliveries);
    if let (Some(before), Some(after)) = (cpu, target.cpu()) {
        report.add("server CPU", "s per million", (after - before).as_secs_f64() / (count as f64 / 1e6));
    }
    Ok(report)
}

/// One session and many followers.
pub async fn fanout(target: &Target, options: &Options) -> Outcome {
    let Options { subscribers, rate, time, .. } = *options;
    let writer = clients(target, 1).await?.remove(0);
    let name = fresh("fanout");
    let (session_, producer) = producer(&writer, &name).await?;
    let readers = clients(target, subscribers).await?;
    let mut subscriptions = Vec::new();
    for reader in &readers {
        subscriptions.push(caught_up(&session(reader, &name).await?).await?);
    }
    let epoch = Instant::now() + LEAD;
    let cpu = target.cpu();
    let mut reading = JoinSet::new();
    let (tell, appended) = watch::channel(None);
    for subscription in subscriptions {
        reading.spawn(follow(subscription, epoch, appended.clone()));
    }
    let due = pace(1, rate, epoch, epoch + time).remove(0);
    tell.send_replace(Some(paced(session_, producer, options.bytes, epoch, due).await?.count()));
    let mut deliveries = Latencies::default();
    join(reading).await?.iter().for_each(|more| deliveries.merge(more));
    let count = deliveries.count();
    let mut report = Report::new(format!("fanout {rate}/s to {subscribers}"));
    report.add("deliveries", "records/s", count as f64 / time.as_secs_f64());
    report.latencies(["append to delivered p50", "append to delivered p99", "append to delivered p99.9"], &deliveries);
    if let (Some(before), Some(after)) = (cpu, target.cpu()) {
        report.add("server CPU", "s per million", (after - before).as_secs_f64() / (count as f64 / 1e6));
    }
    Ok(report)
}

/// Fills a session.
async fn fill(client: &Client, name: &str, records: u64, bytes: usize) -> Result<(), String> {
    let (session, producer) = producer(client, name).await?;
    let payload = Bytes::from(vec![b'x'; bytes]);
    let mut last = None;
    for _ in 0..records {
        last = Some(producer.append(session.main(), payload.clone()).await.map_err(text)?);
    }
    if let Some(ticket) = last {
        ticket.wait().await.map_err(text)?;
    }
    Ok(())
}

/// What records take on the disk: all of it, and without the journals, which are reused and never outgrow their own bound.
fn add_disk(report: &mut Report, before: Option<Disk>, after: Option<Disk>, records: f64) {
    if let (Some(before), Some(after)) = (before, after) {
        let (all, journals) = (after.all - before.all, after.journals - before.journals);
        report.add("disk for each record", "B", all / records);
        report.add("the same without journals", "B", (all - journals) / records);
    }
}

/// Reads a long session from its beginning.
pub async fn replay(target: &Target, options: &Options) -> Outcome {
    let Options { records, bytes, .. } = *options;
    let writer = clients(target, 1).await?.remove(0);
    let name = fresh("replay");
    let disk = target.disk();
    fill(&writer, &name, records, bytes).await?;
    let reader = clients(target, 1).await?.remove(0);
    let session = session(&reader, &name).await?;
    let (before, cpu) = (target.memory(), target.cpu());
    let most = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut subscription = session.subscribe(Start::Earliest).open().await.map_err(text)?;
    let (mut next, mut first, mut looked) = (0, None, begun);
    while next < records {
        let event = subscription.next().await.ok_or("the subscription ended")?.map_err(text)?;
        if let Event::Records(batch) = event {
            first.get_or_insert_with(|| begun.elapsed());
            for record in batch.iter() {
                let record = record.map_err(text)?;
                if record.record.payload.len() != bytes {
                    return Err("a record has another length".into());
                }
                next = record.seq + 1;
            }
        }
        if looked.elapsed() > Duration::from_millis(50) {
            looked = Instant::now();
            most.fetch_max(target.memory().unwrap_or(0.0) as u64, Ordering::Relaxed);
        }
    }
    let took = begun.elapsed().as_secs_f64();
    let mut report = Report::new(format!("replay {records} records"));
    report.add("read, delivered and decoded", "records/s", records as f64 / took);
    report.add("time to first record", "ms", first.unwrap_or_default().as_secs_f64() * 1e3);
    if let Some(before) = before {
        let grown = (most.load(Ordering::Relaxed) as f64 - before).max(0.0);
        report.add("server memory grew by", "MiB", grown / (1 << 20) as f64);
    }
    if let (Some(before), Some(after)) = (cpu, target.cpu()) {
        report.add("server CPU", "s per million", (after - before).as_secs_f64() / (records as f64 / 1e6));
    }
    add_disk(&mut report, disk, target.disk(), records as f64);
    late_joiner(target, &writer, &name, &mut report).await?;
    Ok(report)
}

/// Parts of the message that a late joiner finds, and bytes of each.
const PARTS: usize = 10_000;
const PART: &[u8] = b"token";

/// A message of many small parts in a session that is long already: how fast they are stored, and how soon whoever comes then
/// has it whole.
async fn late_joiner(target: &Target, writer: &Client, name: &str, report: &mut Report) -> Result<(), String> {
    let session = session(writer, name).await?;
    let producer = session.producer("bench").await.map_err(text)?;
    let message = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.map_err(text)?;
    let (begun, cpu) = (Instant::now(), target.cpu());
    for _ in 0..PARTS {
        message.append(PART).await.map_err(text)?;
    }
    producer.flush().await.map_err(text)?;
    report.add("parts of a message", "records/s", PARTS as f64 / begun.elapsed().as_secs_f64());
    if let (Some(before), Some(after)) = (cpu, target.cpu()) {
        report.add("the same, server CPU", "s per million", (after - before).as_secs_f64() / (PARTS as f64 / 1e6));
    }
    let mut took = Vec::new();
    for _ in 0..11 {
        let begun = Instant::now();
        let client = target.client(Config::default()).map_err(text)?;
        let mut live = client.session(name).map_err(text)?.live().await.map_err(text)?;
        while !matches!(live.next().await.ok_or("the view ended")?.map_err(text)?, Update::Started) {}
        let found = live.view().messages().get(message.id()).map_or(0, |message| message.text.len());
        if found != PARTS * PART.len() {
            return Err(format!("a late joiner found {found} bytes of {}", PARTS * PART.len()));
        }
        took.push(begun.elapsed());
    }
    took.sort_unstable();
    report.add("a late joiner is connected and has it whole p50", "ms", took[took.len() / 2].as_secs_f64() * 1e3);
    report.add("the same, slowest of 11", "ms", took[took.len() - 1].as_secs_f64() * 1e3);
    Ok(())
}

/// Waits until what the store takes has not changed for ten seconds, two minutes at most.
async fn settled(target: &Target) {
    let all = || target.disk().map(|disk| disk.all);
    let (begun, mut since, mut last) = (Instant::now(), Instant::now(), all());
    while since.elapsed() < Duration::from_secs(10) && begun.elapsed() < Duration::from_secs(120) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = all();
        if now != last {
            (since, last) = (Instant::now(), now);
        }
    }
}

/// Parts of each message that is compacted.
const MESSAGE_PARTS: usize = 200;

/// What a session at a modest rate feels while others finish message after message, on a server that never compacts and on one that
/// does so at once.
pub async fn compact(options: &Options) -> Outcome {
    let Options { sessions, rate, time, bytes, .. } = *options;
    let mut report = Report::new(format!("compact {sessions} sessions beside one x {rate}/s"));
    for (after, names) in [
        (
            "never",
            ["append to ack p50, never compacted", "the same p99", "parts beside it", "bytes stored for each part"],
        ),
        (
            "0",
            [
                "append to ack p50, while compacted",
                "the same p99, while compacted",
                "parts beside it, while compacted",
                "bytes stored for each part, compacted",
            ],
        ),
    ] {
        let mut target = Target::start_with(&["--compact-after", after]).await;
        let client = clients(&target, 1).await?.remove(0);
        let (session, own) = producer(&client, &fresh("paced")).await?;
        let epoch = Instant::now() + LEAD;
        let end = epoch + time;
        let mut writing = JoinSet::new();
        for client in clients(&target, sessions).await? {
            writing.spawn(async move {
                let (session, producer) = producer(&client, &fresh("messages")).await?;
                let (part, mut parts) = (vec![b'x'; bytes], 0u64);
                while Instant::now() < end {
                    let message = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await;
                    let message = message.map_err(text)?;
                    for _ in 0..MESSAGE_PARTS {
                        message.append(part.clone()).await.map_err(text)?;
                    }
                    message
                        .end(mainstay_client::Status::Complete, "")
                        .await
                        .map_err(text)?
                        .wait()
                        .await
                        .map_err(text)?;
                    parts += MESSAGE_PARTS as u64;
                }
                Ok(parts)
            });
        }
        let due = pace(1, rate, epoch, end).remove(0);
        let acks = paced(session, own, 100, epoch, due).await?;
        let parts: u64 = join(writing).await?.into_iter().sum();
        report.add(names[0], "ms", acks.at(0.5));
        report.add(names[1], "ms", acks.at(0.99));
        report.add(names[2], "records/s", parts as f64 / time.as_secs_f64());
        settled(&target).await;
        if let Some(stored) = target.stored().await {
            report.add(names[3], "B", stored / parts as f64);
        }
    }
    Ok(report)
}

/// Idle attached connections, and cold sessions.
pub async fn idle(target: &mut Target, options: &Options) -> Outcome {
    let Options { connections, sessions, bytes, .. } = *options;
    let mut report = Report::new(format!("idle {connections} connections, {sessions} cold sessions"));
    let (before, heap) = (target.memory(), target.heap().await);
    let readers = clients(target, connections).await?;
    let mut held = Vec::new();
    for (n, reader) in readers.iter().enumerate() {
        let session = session(reader, &format!("bench:idle:{}:{n}", std::process::id())).await?;
        let subscription = caught_up(&session).await?;
        held.push((session, subscription));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    if let (Some(before), Some(after)) = (before, target.memory()) {
        report.add("server memory for each attached connection", "KiB", (after - before) / connections as f64 / 1024.0);
    }
    if let (Some(before), Some(after)) = (heap, target.heap().await) {
        report.add("server heap for each attached connection", "KiB", (after - before) / connections as f64 / 1024.0);
    }
    drop((held, readers));
    if sessions == 0 {
        return Ok(report);
    }
    let writers = clients(target, 16).await?;
    let (memory, heap, disk) = (target.memory(), target.heap().await, target.disk());
    let run = fresh("cold");
    let mut tasks = JoinSet::new();
    for (w, writer) in writers.into_iter().enumerate() {
        let run = run.clone();
        tasks.spawn(async move {
            for n in (w..sessions).step_by(16) {
                fill(&writer, &format!("{run}:{n}"), 10, bytes).await?;
            }
            Ok(())
        });
    }
    join(tasks).await?;
    add_disk(&mut report, disk, target.disk(), (sessions * 10) as f64);
    // Sessions leave memory ten seconds after their last use.
    tokio::time::sleep(Duration::from_secs(14)).await;
    if let (Some(before), Some(after)) = (memory, target.memory()) {
        report.add("server memory for each cold session", "B", (after - before) / sessions as f64);
    }
    if let (Some(before), Some(after)) = (heap, target.heap().await) {
        report.add("server heap for each cold session", "B", (after - before) / sessions as f64);
    }
    if let Some(server) = target.server() {
        server.terminate().await;
        server.restart().await;
        let before = target.memory().unwrap_or(0.0);
        report.add("server memory after a restart", "MiB", before / (1 << 20) as f64);
        if let Some(heap) = target.heap().await {
            report.add("server heap after a restart", "MiB", heap / (1 << 20) as f64);
        }
    }
    Ok(report)
}

/// Bytes that are stored before a start is measured.
const STORED: usize = 1 << 30;
/// Bytes that are written before each kill: what the last flush did not have.
const BEHIND: usize = 32 << 20;
/// Records of that: large ones are written faster.
const LARGE: usize = 16 << 10;
/// Starts that are measured.
const STARTS: usize = 5;

/// A start over a gibibyte, of a server that was killed while it was written to, beside one over nothing.
pub async fn start(target: &mut Target, options: &Options) -> Outcome {
    let sessions = options.sessions;
    let mut report = Report::new(format!("start over 1 GiB in {sessions} sessions"));
    let mut nothing = Vec::new();
    for _ in 0..STARTS {
        let begun = Instant::now();
        drop(Target::start().await);
        nothing.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    let write = async |target: &Target, round: usize, bytes: usize| -> Result<(), String> {
        let mut writing = JoinSet::new();
        for (n, client) in clients(target, sessions).await?.into_iter().enumerate() {
            let records = (bytes / LARGE / sessions) as u64;
            writing.spawn(async move { fill(&client, &format!("s{n}-{round}"), records, LARGE).await });
        }
        join(writing).await.map(drop)
    };
    write(target, 0, STORED).await?;
    let mut starts = Vec::new();
    for round in 1..=STARTS {
        write(target, round, BEHIND).await?;
        let server = target.server().ok_or("start needs a server of its own")?;
        server.kill().await;
        let begun = Instant::now();
        server.restart().await;
        starts.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    for ([median, longest], mut times) in [
        (["start over nothing, median", "start over nothing, longest"], nothing),
        (["start after a kill, median", "start after a kill, longest"], starts),
    ] {
        times.sort_by(f64::total_cmp);
        report.add(median, "ms", times[times.len() / 2]);
        report.add(longest, "ms", times[times.len() - 1]);
    }
    Ok(report)
}

/// A cold attach over a long path: connect, attach, subscribe, first record.
pub async fn reconnect(target: &mut Target, options: &Options) -> Outcome {
    let Options { rtt, .. } = *options;
    let client = clients(target, 1).await?.remove(0);
    let name = fresh("reconnect");
    // The first record in a chunk of its own: how the others were batched must not count.
    fill(&client, &name, 1, options.bytes).await?;
    fill(&client, &name, 99, options.bytes).await?;
    let server = target.server().ok_or("reconnect needs a server of its own")?;
    let faults = Faults { delay: rtt / 2, ..Faults::default() };
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), faults, 1).map_err(text)?;
    let file = server.connect_file_at(proxy.addr(), "bench-proxy.json");
    let file = mainstay_client::ConnectFile::read(&file).map_err(text)?;
    let (mut attached, mut first) = (Latencies::default(), Latencies::default());
    for _ in 0..20 {
        let begun = Instant::now();
        let client = Client::connect_quic(&file, Config::default()).map_err(text)?;
        let mut subscription =
            client.session(&name).map_err(text)?.subscribe(Start::Earliest).open().await.map_err(text)?;
        attached.add(begun.elapsed());
        loop {
            let event = subscription.next().await.ok_or("the subscription ended")?.map_err(text)?;
            if matches!(event, Event::Records(_)) {
                break;
            }
        }
        first.add(begun.elapsed());
    }
    let mut report = Report::new(format!("reconnect at {} ms", rtt.as_millis()));
    report.add("attached p50", "ms", attached.at(0.5));
    report.add("first record p50", "ms", first.at(0.5));
    report.add("first record p99", "ms", first.at(0.99));
    Ok(report)
}
