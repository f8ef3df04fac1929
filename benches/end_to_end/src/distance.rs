//! A broker that is further away: a TCP proxy on loopback that lets every byte arrive later, and none slower.

use crate::stand::Stand;
use anyhow::Result;
use outbox_relay_chaos::proxy::{led_to, target_of};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Pieces under way in one direction. So many of 64 KiB are more than any link of some milliseconds holds.
const UNDER_WAY: usize = 4096;

/// The broker's URL, through a proxy if it is to be further away.
pub async fn amqp_url(stand: &Stand, round_trip: Duration) -> Result<String> {
    let url = stand.amqp_url();
    if round_trip.is_zero() {
        return Ok(url.to_owned());
    }
    let proxy = proxy(target_of(url), round_trip / 2).await?;
    Ok(led_to(proxy, url))
}

/// A timer of tokio ends at the next full millisecond, and then a task has to be woken: about so late.
const TIMER_IS_LATE: Duration = Duration::from_millis(1);

/// Listens, and carries each connection to `target`; every byte takes about `one_way` longer: what it is in the end is measured.
async fn proxy(target: String, one_way: Duration) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(&target).await else { continue };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            let delay = one_way.saturating_sub(TIMER_IS_LATE);
            tokio::spawn(carry(near_in, far_out, delay));
            tokio::spawn(carry(far_in, near_out, delay));
        }
    });
    Ok(address)
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, one_way: Duration) {
    let (pieces, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let arrive = async move {
        while let Some((at, piece)) = arriving.recv().await {
            sleep_until(at).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    let depart = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            if pieces.send((Instant::now() + one_way, buffer[..length].to_vec())).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(arrive, depart);
}
