//! What `state watch` and `presence` share: the view of a session, and each change of it, until a signal.

use core::ops::ControlFlow;

use mainstay_client::{Client, LiveView, Update};
use serde_json::json;

use crate::data::patiently;
use crate::failure::Failure;
use crate::output::{Output, Screen};
use crate::serve::signalled;

/// Follows the view of a session, for which it waits if it is told to, and shows what `tell` says of it at first and of each change.
/// Ends with the session, at a signal, or when `tell` says so.
pub(crate) async fn watch(
    client: &Client,
    session: &str,
    waits: bool,
    output: Output,
    mut tell: impl FnMut(&LiveView, Update, &mut Screen) -> Result<ControlFlow<()>, Failure>,
) -> Result<(), Failure> {
    let stop = signalled();
    tokio::pin!(stop);
    let mut attaching = client.session(session)?;
    if waits {
        attaching = attaching.wait();
    }
    let mut view = tokio::select! {
        view = patiently(client, session, output, attaching.live()) => view?,
        () = &mut stop => return Ok(()),
    };
    let mut screen = Screen::new(output);
    loop {
        let update = tokio::select! {
            update = view.next() => update,
            () = &mut stop => return Ok(()),
        };
        let Some(update) = update else { return Ok(()) };
        let goes_on = match update? {
            Update::CaughtUp { tail } => {
                screen.json_only(&json!({"event": "caught_up", "tail": tail}));
                ControlFlow::Continue(())
            }
            Update::Resumed => {
                screen.json_only(&json!({"event": "reconnected"}));
                ControlFlow::Continue(())
            }
            update => tell(&view, update, &mut screen)?,
        };
        tokio::select! {
            shown = screen.show() => shown?,
            () = &mut stop => return Ok(()),
        }
        if goes_on.is_break() {
            return Ok(());
        }
    }
}
