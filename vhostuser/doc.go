// Package vhostuser is the vhost-user wire protocol, in both roles: the back-end (vhostd) and the front-end (a VMM, and
// in this project the test guest and the benchmark).
//
// # Theory of operation
//
// The front-end owns a virtual machine; the back-end serves the machine's virtqueues. They talk over a UNIX stream
// socket: the front-end sends requests, the back-end answers some of them, and file descriptors (guest memory,
// eventfds) ride along as ancillary data. No frame of guest traffic ever passes here: this is the control path.
//
//	front-end                                      back-end
//	FrontEnd  --- Message{Request,Flags,Payload,FDs} ---> Serve -> Handler (one typed method per message)
//	          <-- reply, with the reply flag -----------
//	ServeBackChannel <--- CONFIG_CHANGE_MSG ------------- BackendConn  (a second socket, SET_BACKEND_REQ_FD)
//
// A message is a 12-byte header and a payload, in the byte order of the machine:
//
//	 0        4        8       12
//	+--------+--------+--------+------------------------+
//	|request | flags  | size   | payload, size bytes    |
//	+--------+--------+--------+------------------------+
//	          bits 0-1 version (1), bit 2 reply, bit 3 need_reply, all others zero
//
// One table (table.go) says for each request what payload and how many file descriptors it has, what answers it, which
// protocol feature it needs and which queues stand still meanwhile. Codec, checks, dispatch and front-end follow it.
//
// # Who is to blame, and what happens
//
// A front-end that breaks the framing (version, reserved flag bits, a reply flag on a request, a size or a number of
// file descriptors that the table does not allow, an unfinished message) loses its connection: nothing after such a
// message can be trusted. So does one that acks features which were not offered.
//
// A well-framed request that cannot be served (unknown, not negotiated, a virtqueue that does not exist, an error of
// the Handler) is answered with a non-zero ack if the front-end asked for one (need_reply, with REPLY_ACK negotiated),
// and the session goes on. If it did not ask, it would go on in the belief that all is well: then the connection is
// closed instead. A request that has a reply of its own is never acked; if it cannot be answered the connection is
// closed, so that the front-end never waits for ever. GET_CONFIG alone has a neutral way out, an empty reply.
//
// # Ownership of file descriptors
//
// Every descriptor that is received is close-on-exec and has exactly one owner. Message owns its FDs until they are
// taken. A Handler method owns the descriptors that it is passed from the moment it is called, also if it returns an
// error; Serve closes all others. Descriptors given to send (FrontEnd, Conn.WriteMessage) stay the caller's.
//
// # Limits
//
// Payloads have at most MaxPayload bytes and messages at most MaxFDs descriptors. Once the first byte of a message is
// there, the rest must follow within ConnOptions.PartialTimeout; writes end within ConnOptions.WriteTimeout. Between
// messages a front-end may be silent for as long as it likes.
package vhostuser
