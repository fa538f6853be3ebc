//! Backups and what is brought back from them, while everybody works (spec section 9.6).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mainstay_client::{Client, ClientError, Config, Cursor, Doing, Session};
use mainstay_store::backup::{BackupReader, BackupWriter, Item};
use mainstay_tests::disk::Disk;
use mainstay_tests::live::{attach, records};
use mainstay_tests::process::{PATIENCE, Server, events, run};
use mainstay_tests::{skipped, until};
use serde_json::Value;
use tokio::time::timeout;

/// Runs a command on the server's data directory, and returns its exit code and events.
async fn on(server: &Server, args: &[&str]) -> (Option<i32>, Vec<Value>) {
    let data = server.dir().to_str().expect("text");
    let output = run(server.command(&[args, &["--json", "--data", data]].concat())).await;
    (output.status.code(), events(&output.stdout))
}

/// Writes until told to stop, and counts what is acknowledged.
async fn write(session: Session, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) {
    let producer = session.producer("p").await.expect("a producer");
    while !stop.load(Ordering::Relaxed) {
        let n = acknowledged.load(Ordering::Relaxed);
        let ticket = producer.append(session.main(), n.to_string()).await.expect("append");
        assert_eq!(timeout(PATIENCE, ticket.wait()).await.expect("in time"), Ok(n));
        acknowledged.store(n + 1, Ordering::Relaxed);
    }
}

async fn texts(client: &Client, session: &str) -> Vec<String> {
    let records = records(&attach(client, session).await).await;
    records.into_iter().map(|record| String::from_utf8_lossy(&record.payload).into_owned()).collect()
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_deleted_comes_back_while_everybody_works_and_nobody_goes_on_as_if_nothing_had_been() {
    const SESSIONS: usize = 4;
    let mut server = Server::start().await;
    let client = server.client(Config::default());
    let stop = Arc::new(AtomicBool::new(false));
    let counts: Vec<Arc<AtomicU64>> = (0..SESSIONS).map(|_| Arc::default()).collect();
    let mut writing = Vec::new();
    for (n, count) in counts.iter().enumerate() {
        let session = client.session(&format!("s{n}")).expect("a name").create().attach().await.expect("attach");
        writing.push(tokio::spawn(write(session, stop.clone(), count.clone())));
    }
    let enough = |least: u64| counts.iter().all(|count| count.load(Ordering::Relaxed) >= least);
    until("everybody has written", async || enough(100)).await;
    let before: Vec<u64> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    let file = server.dir().join("backup");
    let file = file.to_str().expect("text");
    let (code, said) = on(&server, &["backup", file]).await;
    assert_eq!((code, said[0]["event"].as_str(), said[0]["sessions"].as_u64()), (Some(0), Some("saved"), Some(4)));
    let after: Vec<u64> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    // More is written that the backup does not have, and read.
    until("everybody has written more", async || enough(after.iter().max().expect("some") + 50)).await;
    stop.store(true, Ordering::Relaxed);
    for writing in writing {
        writing.await.expect("a writer");
    }
    let old = client.session("s1").expect("a name").attach().await.expect("attach");
    let cursor = Cursor { incarnation: old.info().incarnation, next: 10 };
    old.delete().await.expect("deleted");
    let (code, said) = on(&server, &["restore", file, "--session", "s1"]).await;
    assert_eq!((code, said[0]["sessions"].as_u64()), (Some(0), Some(1)), "{said:?}");
    // The others are left as they are.
    for n in [0, 2, 3] {
        let expected = numbers(counts[n].load(Ordering::Relaxed) as usize);
        assert_eq!(texts(&client, &format!("s{n}")).await, expected);
    }
    let back = texts(&client, "s1").await;
    assert_eq!(back, numbers(back.len()));
    assert!((before[1]..=after[1] + 1).contains(&(back.len() as u64)), "{} of {before:?}..{after:?}", back.len());
    let new = attach(&client, "s1").await;
    assert_ne!(new.info().incarnation, cursor.incarnation, "it is another life");
    let gone = client.session("s1").expect("a name").at(cursor).attach().await;
    assert!(matches!(gone, Err(ClientError::Gone)), "{gone:?}");
    assert!(matches!(timeout(PATIENCE, old.ended()).await, Ok(ClientError::Gone)));
    // It goes on behind what it was.
    let producer = new.producer("p").await.expect("a producer");
    let ticket = producer.append(new.main(), back.len().to_string()).await.expect("append");
    assert_eq!(timeout(PATIENCE, ticket.wait()).await.expect("in time"), Ok(back.len() as u64));
    client.finish().await;
    // The same without a server: in the place of a store that is lost.
    server.kill().await;
    std::fs::remove_dir_all(server.dir().join("store")).expect("removed");
    let (code, said) = on(&server, &["restore", file]).await;
    assert_eq!((code, said[0]["sessions"].as_u64()), (Some(0), Some(4)), "{said:?}");
    server.restart().await;
    let client = server.client(Config::default());
    for n in 0..SESSIONS {
        let back = texts(&client, &format!("s{n}")).await;
        assert_eq!(back, numbers(back.len()));
        assert!((before[n]..=after[n] + 1).contains(&(back.len() as u64)));
    }
    let output = run(server.command(&["verify", "--online"])).await;
    assert!(output.status.success());
}

#[tokio::test]
async fn what_cannot_be_brought_back_is_told_by_name() {
    let server = Server::start().await;
    let client = server.client(Config::default());
    let session = client.session("there").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    for n in 0..10 {
        producer.append(session.main(), n.to_string()).await.expect("append").wait().await.expect("stored");
    }
    let file = server.dir().join("backup");
    let path = file.to_str().expect("text");
    assert_eq!(on(&server, &["backup", path]).await.0, Some(0));
    let refused = async |args: &[&str], code: i32, name: &str| {
        let (exit, said) = on(&server, args).await;
        let error = said.iter().find(|event| event["event"] == "error").expect("an error");
        assert_eq!((exit, error["code"].as_str()), (Some(code), Some(name)), "{said:?}");
    };
    refused(&["restore", path, "--session", "there"], 3, "SESSION_EXISTS").await;
    refused(&["restore", path, "--session", "nobody"], 3, "SESSION_NOT_FOUND").await;
    let whole = std::fs::read(&file).expect("the backup");
    std::fs::write(&file, &whole[..whole.len() - 1]).expect("write");
    refused(&["restore", path], 5, "BACKUP_DAMAGED").await;
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    std::fs::write(&file, &changed).expect("write");
    refused(&["restore", path], 5, "BACKUP_DAMAGED").await;
    let nowhere = server.dir().join("no").join("backup");
    refused(&["backup", nowhere.to_str().expect("text")], 1, "IO").await;
    refused(&["backup", "/dev/null"], 2, "USAGE").await;
    refused(&["restore", "/dev"], 1, "IO").await;
    std::fs::write(&file, b"mainstay backup 9\n").expect("write");
    refused(&["restore", path], 1, "VERSION").await;
    // A link stays one.
    let link = server.dir().join("link");
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    assert_eq!(on(&server, &["backup", link.to_str().expect("text")]).await.0, Some(0));
    assert!(link.is_symlink());
    assert_eq!(std::fs::read(&file).expect("the backup").len(), whole.len());
    // One that has a session that could not be read says so.
    let mut reader = BackupReader::new(&whole[..]).expect("a backup");
    let Ok(Some(Item::Session(saved))) = reader.next() else { panic!("no session") };
    let mut writer = BackupWriter::new(Vec::new()).expect("memory");
    writer.session(&saved).expect("memory");
    writer.broken(0, "stored data is damaged").expect("memory");
    std::fs::write(&file, writer.finish().expect("memory").0).expect("write");
    let output = run(server.command(&["restore", path, "--check"])).await;
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(texts(&client, "there").await, numbers(10));
}

/// Spec BACKUP-4, PRES-4: whoever was a member when it was saved is heard of, or is not one any more, also where nobody asks.
#[tokio::test]
async fn a_session_that_comes_back_to_an_idle_server_is_looked_after() {
    let mut before = Server::start().await;
    let client = before.client(Config::default());
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let doing = Doing::new("idle").expect("a word");
    let _member = session.join("phone", Duration::from_secs(1), doing).await.expect("joined");
    let file = before.dir().join("backup");
    let file = file.to_str().expect("text");
    assert_eq!(on(&before, &["backup", file]).await.0, Some(0));
    before.kill().await;
    let server = Server::start().await;
    let idle = server.client(Config::default());
    assert!(idle.list("").await.expect("a list").is_empty());
    let (code, said) = on(&server, &["restore", file]).await;
    assert_eq!((code, said[0]["records"].as_u64()), (Some(0), Some(1)), "{said:?}");
    // A list loads no session.
    until("the member is lost", async || idle.list("s").await.expect("a list")[0].tail == 2).await;
}

#[tokio::test]
async fn a_backup_that_finds_no_space_leaves_the_one_before_and_the_server_as_it_is() {
    let temp = tempfile::tempdir().expect("a directory");
    let disk = match Disk::make(temp.path(), 64) {
        Ok(disk) => disk,
        Err(why) => return skipped("a backup without space", &why),
    };
    disk.fill(1 << 20).expect("a disk that is nearly full");
    let backups = disk.root().join("backups");
    std::fs::create_dir(&backups).expect("a directory");
    let server = Server::start().await;
    let client = server.client(Config::default());
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let file = backups.join("backup");
    let path = file.to_str().expect("text");
    let append = async |bytes: usize| {
        let ticket = producer.append(session.main(), vec![b'x'; bytes]).await.expect("append");
        ticket.wait().await.expect("stored");
    };
    append(1000).await;
    assert_eq!(on(&server, &["backup", path]).await.0, Some(0));
    let before = std::fs::read(&file).expect("the backup");
    for _ in 0..10 {
        append(200_000).await;
    }
    let (code, said) = on(&server, &["backup", path]).await;
    assert_eq!((code, said[0]["code"].as_str()), (Some(1), Some("IO")), "{said:?}");
    assert_eq!(std::fs::read(&file).expect("the backup"), before);
    let left = std::fs::read_dir(&backups).expect("a directory").count();
    assert_eq!(left, 1, "nothing of the other one stays");
    append(10).await;
}
