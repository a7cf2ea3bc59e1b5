//! The engine at work: its threads, what they share, and how they talk.

pub(crate) mod around;
pub(crate) mod bell;
pub(crate) mod call;
pub(crate) mod callbacks;
pub(crate) mod children;
pub(crate) mod command;
pub(crate) mod engine;
pub(crate) mod fault;
pub(crate) mod handler;
pub(crate) mod handles;
pub(crate) mod insert;
pub(crate) mod keeper;
mod level;
pub(crate) mod patience;
pub(crate) mod resolve;
pub(crate) mod shared;
pub(crate) mod strays;
pub(crate) mod threads;
pub(crate) mod workers;
