//! `presence` and `join`: who is in a session, and being there.

use core::ops::ControlFlow;
use core::time::Duration;

use mainstay_client::{
    Author, Client, ClientError, Config, Doing, Folded, Kind, LiveView, Member, Payload, PresenceLeft, Update,
};
use serde_json::{Value, json};

use super::watch::watch;
use crate::args;
use crate::data::{patiently, with_client};
use crate::failure::{Exit, Failure};
use crate::output::{Output, Screen, time};
use crate::rows;
use crate::serve::signalled;

pub(crate) async fn run(args: args::Presence, output: Output) -> Result<(), Failure> {
    let mut config = Config::default();
    if !args.watch {
        // Somebody waits for one answer, not for a server to come back.
        config.give_up_after = Some(Duration::from_secs(5));
    }
    with_client(args.connect.connect.as_deref(), config, output, async |client| follow(client, &args, output).await)
        .await
}

async fn follow(client: &Client, args: &args::Presence, output: Output) -> Result<(), Failure> {
    watch(client, &args.session, args.watch, output, |view, update, screen| {
        match update {
            Update::Started => {
                let members = view.view().members();
                if members.is_empty() && !args.watch {
                    screen.raw(b"nobody is here\n");
                }
                members.iter().for_each(|(author, member)| show(author, member, screen));
                if !args.watch {
                    return Ok(ControlFlow::Break(()));
                }
            }
            Update::Record(folded) if folded.record.kind == Kind::SESSION_CLOSED => {
                let event = json!({"event": "closed", "seq": folded.seq});
                screen.event(&event, || "the session is closed; nobody is in it any more".to_owned());
            }
            Update::Record(folded) => changed(view, &folded, screen)?,
            _ => {}
        }
        Ok(ControlFlow::Continue(()))
    })
    .await
}

fn changed(view: &LiveView, folded: &Folded, screen: &mut Screen) -> Result<(), Failure> {
    match folded.record.kind {
        Kind::PRESENCE_JOINED | Kind::PRESENCE_UPDATED => {
            if let Some(member) = view.view().members().get(&folded.author) {
                show(&folded.author, member, screen);
            }
        }
        Kind::PRESENCE_LEFT => {
            let left = PresenceLeft::of(&folded.record).map_err(ClientError::from)?;
            let event = json!({
                "event": "left", "author": left.member.to_string(), "generation": left.generation,
                "reason": left.reason.as_str(), "seq": folded.seq,
            });
            screen.event(&event, || format!("{} {}", left.member, left.reason.as_str()));
        }
        _ => {}
    }
    Ok(())
}

fn show(author: &Author, member: &Member, screen: &mut Screen) {
    screen.event(&row(author, member), || {
        let progress = member.activity.progress.map_or_else(String::new, |percent| format!(" {percent} %"));
        format!("{} ({author}): {}{progress}", member.name, member.activity.status)
    });
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
    with_client(args.connect.connect.as_deref(), Config::default(), output, async |client| {
        let stop = signalled();
        tokio::pin!(stop);
        let attaching = client.session(&args.session)?.create();
        let session = tokio::select! {
            session = patiently(client, &args.session, output, attaching.attach()) => session?,
            () = &mut stop => return Ok(()),
        };
        let mut joining = core::pin::pin!(patiently(client, &args.session, output, session.join(&name, grace, doing)));
        let joined = tokio::select! {
            membership = &mut joining => Some(membership?),
            () = &mut stop => None,
        };
        if let Some(membership) = &joined {
            let event = json!({"event": "joined", "name": name, "generation": membership.generation()});
            output.event(&event, || format!("{name} is in {} until this is interrupted", args.session))?;
            tokio::select! {
                () = &mut stop => {}
                error = session.ended() => return Err(error.into()),
            }
        }
        let leaving = async {
            let membership = match joined {
                Some(membership) => membership,
                // It may be there already, and was not told so.
                None => joining.await?,
            };
            membership.leave().await.map_err(Failure::from)
        };
        // A server that does not answer finds out by itself.
        match tokio::time::timeout(Duration::from_secs(2), leaving).await {
            Ok(left) => left,
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
