#include "textflag.h"

// func Fence()
TEXT ·Fence(SB), NOSPLIT, $0-0
	DMB	$0xB // ISH: all loads and stores, inner shareable
	RET
