//! `presence` and `join`: who is in a session, and being there.

use core::time::Duration;

use mainstay_client::{
    Author, Client, ClientError, Config, Doing, Folded, Kind, LiveView, Member, Payload, PresenceLeft, Update,
};
use serde_json::{Value, json};

use super::serve::signalled;
use crate::args;
use crate::data::{patiently, with_client};
use crate::failure::{Exit, Failure};
use crate::output::{Output, room, time};
use crate::rows;

pub(crate) async fn run(args: args::Presence, output: Output) -> Result<(), Failure> {
    let mut config = Config::default();
    if !args.watch {
        // Somebody waits for one answer, not for a server to come back.
        config.give_up_after = Some(Duration::from_secs(5));
    }
    with_client(args.connect.connect.as_deref(), config, async |client| follow(client, &args, output).await).await
}

async fn follow(client: &Client, args: &args::Presence, output: Output) -> Result<(), Failure> {
    let stop = signalled();
    tokio::pin!(stop);
    let mut attaching = client.session(&args.session)?;
    if args.watch {
        attaching = attaching.wait();
    }
    let mut view = tokio::select! {
        view = patiently(client, &args.session, output, attaching.live()) => view?,
        () = &mut stop => return Ok(()),
    };
    loop {
        let update = tokio::select! {
            update = view.next() => update,
            () = &mut stop => return Ok(()),
        };
        let Some(update) = update else { return Ok(()) };
        tokio::select! {
            ready = room() => ready?,
            () = &mut stop => return Ok(()),
        }
        match update? {
            Update::Started => {
                if view.view().members().is_empty() && !args.watch {
                    output.text("nobody is here\n")?;
                }
                view.view().members().iter().try_for_each(|(author, member)| show(author, member, output))?;
                if !args.watch {
                    return Ok(());
                }
            }
            Update::CaughtUp { tail } => output.json_only(&json!({"event": "caught_up", "tail": tail}))?,
            Update::Record(folded) => changed(&view, &folded, output)?,
            Update::Resumed => output.json_only(&json!({"event": "reconnected"}))?,
            _ => {}
        }
    }
}

fn changed(view: &LiveView, folded: &Folded, output: Output) -> Result<(), Failure> {
    match folded.record.kind {
        Kind::PRESENCE_JOINED | Kind::PRESENCE_UPDATED => match view.view().members().get(&folded.author) {
            Some(member) => show(&folded.author, member, output),
            None => Ok(()),
        },
        Kind::PRESENCE_LEFT => {
            let left = PresenceLeft::of(&folded.record).map_err(ClientError::from)?;
            let event = json!({
                "event": "left", "author": left.member.to_string(), "generation": left.generation,
                "reason": left.reason.as_str(), "seq": folded.seq,
            });
            output.event(&event, || format!("{} {}", left.member, left.reason.as_str()))
        }
        _ => Ok(()),
    }
}

fn show(author: &Author, member: &Member, output: Output) -> Result<(), Failure> {
    output.event(&row(author, member), || {
        let progress = member.activity.progress.map_or_else(String::new, |percent| format!(" {percent} %"));
        format!("{} ({author}): {}{progress}", member.name, member.activity.status)
    })
}

fn row(author: &Author, member: &Member) -> Value {
    let mut row = json!({
        "event": "member",
        "author": author.to_string(),
        "name": member.name.as_str(),
        "status": member.activity.status.as_str(),
        "generation": member.generation,
        "since": time(member.time),
        "seq": member.updated,
    });
    if let Some(percent) = member.activity.progress {
        row["progress"] = json!(percent);
    }
    if !member.activity.data.is_empty() {
        rows::bytes(&mut row, "data", &member.activity.data);
    }
    row
}

pub(crate) async fn join(args: args::Join, output: Output) -> Result<(), Failure> {
    let name = args.name.clone().or_else(|| std::env::var("USER").ok()).unwrap_or_else(|| "somebody".into());
    let doing = Doing::new(&args.status)?;
    let grace = Duration::from_secs_f64(args.grace);
    with_client(args.connect.connect.as_deref(), Config::default(), async |client| {
        let stop = signalled();
        tokio::pin!(stop);
        let attaching = client.session(&args.session)?.create();
        let session = tokio::select! {
            session = patiently(client, &args.session, output, attaching.attach()) => session?,
            () = &mut stop => return Ok(()),
        };
        let membership = session.join(&name, grace, doing).await?;
        let event = json!({"event": "joined", "name": name, "generation": membership.generation()});
        output.event(&event, || format!("{name} is in {} until this is interrupted", args.session))?;
        tokio::select! {
            () = &mut stop => {}
            error = session.ended() => return Err(error.into()),
        }
        // A server that does not answer finds out by itself.
        match tokio::time::timeout(Duration::from_secs(2), membership.leave()).await {
            Ok(left) => Ok(left?),
            Err(_) => Err(Failure {
                exit: Exit::Unreachable,
                code: "UNREACHABLE".into(),
                message: "the server does not answer; it will find out when the grace is over".into(),
                retryable: false,
            }),
        }
    })
    .await
}
