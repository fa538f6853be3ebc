//! What the machine can do without us, measured in the same run.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fjall::PersistMode;
use mainstay_transport::quic::{Identity, QuicConnector, QuicListener, ServerKeys, Trust, bind};
use mainstay_transport::{Connection, Connector, Limits, Listener, RecvStream, SendStream};

use crate::report::{Latencies, Report};

type Outcome<T> = Result<T, String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// How long each yardstick runs.
const TIME: Duration = Duration::from_millis(800);

/// All of them, in a directory on the disk that counts.
pub async fn all(dir: &Path) -> Outcome<Report> {
    let mut report = Report::new("yardstick");
    let path = dir.to_owned();
    let disk = tokio::task::spawn_blocking(move || disk(&path)).await.map_err(text)??;
    report.figures.extend(disk.figures);
    quic(&mut report).await?;
    Ok(report)
}

fn disk(dir: &Path) -> Outcome<Report> {
    let mut report = Report::new("yardstick");
    let (rate, latencies) = synced(&dir.join("append"), 100).map_err(text)?;
    report.add("fdatasync after 100 B", "1/s", rate);
    report.add("fdatasync p50", "ms", latencies.at(0.5));
    report.add("fdatasync p99", "ms", latencies.at(0.99));
    // A thousand records of 100 bytes with five bytes of framing each, as one write and one sync.
    let (rate, _) = synced(&dir.join("group"), 105_000).map_err(text)?;
    report.add("plain file, 1000 records a sync", "records/s", rate * 1000.0);
    report.add("raw fjall, 100 x 10 records a sync", "records/s", raw_fjall(&dir.join("fjall"))?);
    Ok(report)
}

/// Appends `bytes` and syncs, over and over.
fn synced(path: &Path, bytes: usize) -> std::io::Result<(f64, Latencies)> {
    let mut file: File = OpenOptions::new().create(true).append(true).open(path)?;
    let block = vec![b'x'; bytes];
    let mut latencies = Latencies::default();
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < TIME {
        file.write_all(&block)?;
        let sync = Instant::now();
        file.sync_data()?;
        latencies.add(sync.elapsed());
        count += 1;
    }
    Ok((f64::from(count) / begun.elapsed().as_secs_f64(), latencies))
}

/// Values of ten records for a hundred sessions in one batch, synced.
fn raw_fjall(dir: &Path) -> Outcome<f64> {
    let db = fjall::Database::builder(dir).journal_compression(fjall::CompressionType::None).open().map_err(text)?;
    let log = db.keyspace("log", fjall::KeyspaceCreateOptions::default).map_err(text)?;
    let value = Bytes::from(vec![b'x'; 1050]);
    let begun = Instant::now();
    let mut round = 0u64;
    while begun.elapsed() < TIME {
        let mut batch = db.batch().durability(Some(PersistMode::SyncData));
        for session in 0..100u64 {
            let key = [session.to_be_bytes(), round.to_be_bytes()].concat();
            batch.insert(&log, key, value.clone());
        }
        batch.commit().map_err(text)?;
        round += 1;
    }
    Ok((round * 1000) as f64 / begun.elapsed().as_secs_f64())
}

/// Raw quinn between two endpoints of this process: throughput of one stream, and ping-pong.
async fn quic(report: &mut Report) -> Outcome<()> {
    let limits = Limits {
        bulk_window: 1 << 20,
        bulk_streams: 4,
        send_budget: 4 << 20,
        keep_alive: None,
        idle: Duration::from_secs(30),
        bidirectional: 8,
        unidirectional: 8,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(text)?.as_secs();
    let identity = Identity::self_signed(&Identity::generate_key()?, now)?;
    let trust = Trust::Pin(identity.pin()?);
    let socket = bind(([127, 0, 0, 1], 0).into()).map_err(text)?;
    let listener = QuicListener::new(socket, identity, &ServerKeys::generate(), None, &limits, b"bench")?;
    let addr = listener.local_addr().ok_or("no address")?;
    let serving = tokio::spawn(async move {
        let connection = listener.accept().await?;
        loop {
            tokio::select! {
                pair = connection.accept_bi() => {
                    let (mut send, mut recv) = pair.ok()?;
                    tokio::spawn(async move {
                        while let Ok(Some(piece)) = recv.read().await {
                            if send.write(&mut [piece]).await.is_err() {
                                return;
                            }
                        }
                    });
                }
                recv = connection.accept_uni() => {
                    let mut recv = recv.ok()?;
                    tokio::spawn(async move { while let Ok(Some(_)) = recv.read().await {} });
                }
            }
        }
        #[allow(unreachable_code, reason = "names the type of the block")]
        Some(())
    });
    let connector = QuicConnector::new(addr, &trust, &limits, b"bench")?;
    let connection = connector.connect(true).await.map_err(text)?;
    let block = Bytes::from(vec![b'x'; 64 * 1024]);
    let mut bulk = connection.open_uni().await.map_err(text)?;
    let (begun, mut sent) = (Instant::now(), 0u64);
    while begun.elapsed() < TIME {
        bulk.write(&mut [block.clone()]).await.map_err(text)?;
        sent += block.len() as u64;
    }
    report.add("raw quinn, one stream", "MB/s", sent as f64 / 1e6 / begun.elapsed().as_secs_f64());
    let (mut send, mut recv) = connection.open_bi().await.map_err(text)?;
    let (begun, mut latencies, mut rounds) = (Instant::now(), Latencies::default(), 0);
    while begun.elapsed() < TIME {
        let ping = Instant::now();
        send.write(&mut [Bytes::from_static(&[b'x'; 100])]).await.map_err(text)?;
        recv.read().await.map_err(text)?;
        latencies.add(ping.elapsed());
        rounds += 1;
    }
    report.add("raw quinn ping-pong", "1/s", f64::from(rounds) / begun.elapsed().as_secs_f64());
    report.add("raw quinn ping-pong p50", "ms", latencies.at(0.5));
    report.add("raw quinn ping-pong p99", "ms", latencies.at(0.99));
    connection.close(0, "done");
    serving.abort();
    Ok(())
}
